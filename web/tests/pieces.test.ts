import { describe, expect, it } from "vitest";
import { decodePieces, visibleText } from "../src/model/pieces";

const bytes = (text: string) => [...new TextEncoder().encode(text)].map((byte) => Uint8Array.of(byte));

describe("token pieces", () => {
  it("shows a character at the byte that completes it, and the bytes before as its parts", () => {
    const texts = decodePieces(bytes("aé€😀"));
    expect(texts.map(({ text }) => text)).toEqual(["a", "é", "é", "€", "€", "€", "😀", "😀", "😀", "😀"]);
    expect(texts.map(({ kind }) => kind)).toEqual([
      "text",
      "part",
      "text",
      "part",
      "part",
      "text",
      "part",
      "part",
      "part",
      "text",
    ]);
  });

  it("decodes pieces that hold whole words and parts", () => {
    const [head, tail] = [new TextEncoder().encode("na").slice(), new TextEncoder().encode("ï")];
    const texts = decodePieces([Uint8Array.of(...head, tail[0] as number), Uint8Array.of(tail[1] as number, 118, 101)]);
    expect(texts).toEqual([
      { kind: "text", text: "na" },
      { kind: "text", text: "ïve" },
    ]);
  });

  it("shows bytes that are no UTF-8 as such, and goes on after them", () => {
    expect(decodePieces([Uint8Array.of(0xff), Uint8Array.of(0x61)])).toEqual([
      { kind: "invalid", text: "\\xff" },
      { kind: "text", text: "a" },
    ]);
    // A character that another one interrupts, an overlong form, a surrogate, a cut end.
    expect(decodePieces([Uint8Array.of(0xe2), Uint8Array.of(0x61)])[0]).toEqual({ kind: "invalid", text: "\\xe2" });
    expect(decodePieces([Uint8Array.of(0xc0, 0xaf)])[0]?.text).toBe("\\xc0\\xaf");
    expect(decodePieces([Uint8Array.of(0xed, 0xa0, 0x80)])[0]?.kind).toBe("invalid");
    expect(decodePieces([Uint8Array.of(0xf0, 0x9f)])[0]?.text).toBe("\\xf0\\x9f");
  });

  it("gives the same text as a decoder of the whole", () => {
    const text = 'def f(x):\n\treturn "naïve — 日本語 👩‍🚀"\n';
    const shown = decodePieces(bytes(text)).filter(({ kind }) => kind === "text");
    expect(shown.map(({ text: part }) => part).join("")).toBe(text);
  });

  it("makes white space, marks and parts visible", () => {
    expect(visibleText({ kind: "text", text: " a\n\t" }, 1)).toBe("␣a↵⇥");
    expect(visibleText({ kind: "text", text: "\u0001" }, 1)).toBe("\\x01");
    expect(visibleText({ kind: "special", text: "" }, 256)).toBe("⟨256⟩");
    expect(visibleText({ kind: "part", text: "é" }, 195)).toBe("‥");
  });
});
