// Token pieces as text. A piece is bytes, and one token may be a part of a character: the character shows at the token
// that completes it, and the tokens before it show as parts.

export type PieceKind = "text" | "part" | "invalid" | "special";

export interface TokenText {
  kind: PieceKind;
  /** What the token shows as; for a part: the character that it belongs to. */
  text: string;
}

function sequenceLength(lead: number): number {
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  if (lead >= 0xf0 && lead <= 0xf4) return 4;
  return 0;
}

const hex = (byte: number) => `\\x${byte.toString(16).padStart(2, "0")}`;

/**
 * The text of each piece. The bytes are decoded as one stream, so characters may span pieces. Bytes that are no UTF-8
 * show as `\xNN`; a piece without bytes is special (a mark such as end of text).
 */
export function decodePieces(pieces: readonly Uint8Array[]): TokenText[] {
  const owners: number[] = [];
  const bytes: number[] = [];
  pieces.forEach((piece, owner) => {
    for (const byte of piece) {
      bytes.push(byte);
      owners.push(owner);
    }
  });
  const texts = pieces.map(() => "");
  const invalid = pieces.map(() => false);
  const partOf: (string | undefined)[] = pieces.map(() => undefined);
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let at = 0;
  while (at < bytes.length) {
    const length = sequenceLength(bytes[at] as number);
    const end = at + length;
    let character: string | null = null;
    if (length > 0 && end <= bytes.length) {
      try {
        character = decoder.decode(Uint8Array.from(bytes.slice(at, end)));
      } catch {
        character = null;
      }
    }
    const owner = owners[at] as number;
    if (character === null) {
      texts[owner] += hex(bytes[at] as number);
      invalid[owner] = true;
      at += 1;
      continue;
    }
    const last = owners[end - 1] as number;
    texts[last] += character;
    for (let i = at; i < end - 1; i++) {
      if (owners[i] !== last) partOf[owners[i] as number] = character;
    }
    at = end;
  }
  return pieces.map((piece, i) => {
    const text = texts[i] as string;
    if (piece.length === 0) return { kind: "special", text: "" };
    if (text === "") return { kind: "part", text: partOf[i] ?? "" };
    return { kind: invalid[i] ? "invalid" : "text", text };
  });
}

/** One token for a label: white space and control characters made visible. */
export function visibleText(token: TokenText, tokenId: number | undefined): string {
  if (token.kind === "special") return tokenId === undefined ? "·" : `⟨${tokenId}⟩`;
  if (token.kind === "part") return "‥";
  return [...token.text]
    .map((character) => {
      if (character === " ") return "␣";
      if (character === "\n") return "↵";
      if (character === "\t") return "⇥";
      const code = character.codePointAt(0) as number;
      return code < 32 || code === 127 ? `\\x${code.toString(16).padStart(2, "0")}` : character;
    })
    .join("");
}
