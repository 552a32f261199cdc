// Request ids: lowercase ULIDs, as everywhere in the fleet.
const ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz";

/** 48 bits of milliseconds, then 80 random bits. */
export function newId(now = Date.now()): string {
  let value = BigInt(now) << 80n;
  let shift = 72n;
  for (const byte of crypto.getRandomValues(new Uint8Array(10))) {
    value |= BigInt(byte) << shift;
    shift -= 8n;
  }
  let id = "";
  for (let at = 125n; at >= 0n; at -= 5n) id += ALPHABET[Number((value >> at) & 31n)];
  return id;
}
