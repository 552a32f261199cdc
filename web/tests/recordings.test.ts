import { create } from "@bufbuild/protobuf";
import { describe, expect, it } from "vitest";
import { RecordingSchema, RecordingState } from "../src/gen/moe_debugger/v1/session_pb";
import { durationS, formatDuration, nextCommands, runningOf, shellWord } from "../src/recordings";

const make = (fields: object) =>
  create(RecordingSchema, { recordingId: "r", sessionId: "s", path: "/data/recordings/r", ...fields });

describe("recordings", () => {
  it("formats how long they took", () => {
    expect([0, 9.9, 62, 3725].map(formatDuration)).toEqual(["0:00", "0:09", "1:02", "1:02:05"]);
  });

  it("counts until now while one runs, and never below zero", () => {
    const running = make({ startedAtUnixNs: 5_000_000_000n });
    expect(durationS(running, 8_500)).toBe(3.5);
    expect(durationS(running, 4_000)).toBe(0);
    expect(durationS(make({ startedAtUnixNs: 5_000_000_000n, endedAtUnixNs: 7_000_000_000n }), 99_000)).toBe(2);
  });

  it("finds the one of a session that runs", () => {
    const done = make({ state: RecordingState.FINISHED });
    const stopping = make({ state: RecordingState.STOPPING });
    const other = make({ state: RecordingState.RECORDING, sessionId: "o" });
    expect(runningOf([done, other], "s")).toBeUndefined();
    expect(runningOf([done, other, stopping], "s")).toBe(stopping);
    expect(runningOf(null, "s")).toBeUndefined();
  });

  it("gives commands that a shell takes as they are", () => {
    expect(shellWord("/a/b-c_1.d")).toBe("/a/b-c_1.d");
    expect(shellWord("/my runs/it's")).toBe(`'/my runs/it'\\''s'`);
    const commands = Object.fromEntries(
      nextCommands(make({ path: "/my runs/r" }), make({ path: "/o" })).map(({ id, command }) => [id, command]),
    );
    expect(commands.report).toBe("moe-debugger report '/my runs/r'");
    expect(commands.diff).toBe("moe-debugger diff /o '/my runs/r'");
    expect(nextCommands(make({}), undefined)[1]?.command).toBe("moe-debugger diff OTHER /data/recordings/r");
  });
});
