// Columns of the wire (little-endian bytes) as typed arrays. A protobuf field is a view into a larger buffer at any
// offset, so numbers are read through a DataView and never by a typed array over that buffer.

function view(bytes: Uint8Array, width: number, what: string): DataView {
  if (bytes.byteLength % width !== 0) {
    throw new RangeError(`${what} has ${bytes.byteLength} bytes, expected a multiple of ${width}`);
  }
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** u64 as doubles: exact up to 2^53, which no count of assignments reaches. */
export function decodeU64(bytes: Uint8Array, what = "u64 column"): Float64Array {
  const data = view(bytes, 8, what);
  const out = new Float64Array(bytes.byteLength / 8);
  for (let i = 0; i < out.length; i++) {
    out[i] = data.getUint32(i * 8, true) + data.getUint32(i * 8 + 4, true) * 4294967296;
  }
  return out;
}

export function decodeU32(bytes: Uint8Array, what = "u32 column"): Uint32Array {
  const data = view(bytes, 4, what);
  const out = new Uint32Array(bytes.byteLength / 4);
  for (let i = 0; i < out.length; i++) out[i] = data.getUint32(i * 4, true);
  return out;
}

export function decodeU16(bytes: Uint8Array, what = "u16 column"): Uint16Array {
  const data = view(bytes, 2, what);
  const out = new Uint16Array(bytes.byteLength / 2);
  for (let i = 0; i < out.length; i++) out[i] = data.getUint16(i * 2, true);
  return out;
}

export function decodeF32(bytes: Uint8Array, what = "f32 column"): Float32Array {
  const data = view(bytes, 4, what);
  const out = new Float32Array(bytes.byteLength / 4);
  for (let i = 0; i < out.length; i++) out[i] = data.getFloat32(i * 4, true);
  return out;
}

export function decodeF64(bytes: Uint8Array, what = "f64 column"): Float64Array {
  const data = view(bytes, 8, what);
  const out = new Float64Array(bytes.byteLength / 8);
  for (let i = 0; i < out.length; i++) out[i] = data.getFloat64(i * 8, true);
  return out;
}

/** IEEE half precision; browsers of this generation do not all have Float16Array. */
export function decodeF16(bytes: Uint8Array, what = "f16 column"): Float32Array {
  const data = view(bytes, 2, what);
  const out = new Float32Array(bytes.byteLength / 2);
  for (let i = 0; i < out.length; i++) {
    const half = data.getUint16(i * 2, true);
    const exponent = (half >> 10) & 31;
    const fraction = half & 1023;
    const magnitude =
      exponent === 0
        ? fraction * 2 ** -24
        : exponent === 31
          ? fraction
            ? Number.NaN
            : Number.POSITIVE_INFINITY
          : (1 + fraction / 1024) * 2 ** (exponent - 15);
    out[i] = half & 0x8000 ? -magnitude : magnitude;
  }
  return out;
}
