import { createClient } from "@connectrpc/connect";
import { describe, expect, it, vi } from "vitest";
import { FakeGateway, SESSION_ID } from "../dev/fake-gateway";
import { DebuggerService, type WatchResponse } from "../src/gen/moe_debugger/v1/gateway_pb";
import { backoffDelay, type Connection, TIMING, WatchConnection, type WatchTiming } from "../src/rpc/watch";

const FAST: WatchTiming = { ...TIMING, firstDelayMs: 1, maxDelayMs: 8 };

function open(fake: FakeGateway, sessionId = SESSION_ID, timing = FAST) {
  const connections: Connection[] = [];
  const messages: WatchResponse[] = [];
  const unknown: string[] = [];
  let sequence = 0n;
  const watch = new WatchConnection(
    createClient(DebuggerService, fake.transport()),
    {
      onConnection: (connection) => connections.push(connection),
      onMessage: (message) => {
        messages.push(message);
        if (message.event.case === "snapshot") sequence = message.event.value.snapshot?.sequence ?? 0n;
        if (message.event.case === "frame") sequence = message.event.value.sequence;
      },
      onUnknownSession: (id) => {
        unknown.push(id);
        watch.retarget({ sessionId: "", maxHz: 10 });
      },
      sequenceOf: () => sequence,
    },
    timing,
  );
  watch.start({ sessionId, maxHz: 10 });
  return { watch, connections, messages, unknown };
}

const frames = (messages: WatchResponse[]) => messages.filter(({ event }) => event.case === "frame");

describe("backoff", () => {
  it("doubles from half a second to thirty, the upper half at random", () => {
    const low = { ...TIMING, random: () => 0 };
    const high = { ...TIMING, random: () => 1 };
    expect([1, 2, 3, 4].map((n) => backoffDelay(n, high))).toEqual([500, 1000, 2000, 4000]);
    expect([1, 2].map((n) => backoffDelay(n, low))).toEqual([250, 500]);
    expect(backoffDelay(40, high)).toBe(30_000);
  });
});

describe("watch", () => {
  it("starts with a snapshot, then frames", async () => {
    const fake = new FakeGateway();
    fake.route(1, 0);
    const { watch, messages, connections } = open(fake);
    await vi.waitFor(() => expect(messages.some(({ event }) => event.case === "snapshot")).toBe(true));
    await vi.waitFor(() => {
      fake.route(2, 1);
      fake.wake();
      expect(frames(messages).length).toBeGreaterThan(0);
    });
    expect(connections.map(({ state }) => state)).toEqual(["connecting", "live"]);
    watch.stop();
  });

  it("comes back by itself after a restart, and resumes at its sequence", async () => {
    const fake = new FakeGateway();
    fake.route(1, 0);
    const { watch, messages, connections } = open(fake);
    await vi.waitFor(() => expect(messages.some(({ event }) => event.case === "snapshot")).toBe(true));
    fake.restart();
    fake.isDown = true;
    await vi.waitFor(() => {
      const last = connections.at(-1);
      expect(last?.state === "reconnecting" && last.attempt >= 3).toBe(true);
    });
    fake.isDown = false;
    await vi.waitFor(() => expect(connections.at(-1)?.state).toBe("live"));
    expect(fake.watchCalls[0]?.resumeAfterSequence).toBe(0n);
    expect(fake.watchCalls.at(-1)?.resumeAfterSequence).toBe(2n);
    watch.stop();
  });

  it("reconnects when nothing was heard for the time of silence", async () => {
    const fake = new FakeGateway();
    const { watch, connections } = open(fake, SESSION_ID, { ...FAST, silenceMs: 40 });
    await vi.waitFor(() => {
      expect(connections.some((c) => c.state === "reconnecting" && c.reason === "silent")).toBe(true);
      expect(fake.watchCalls.length).toBeGreaterThan(1);
    });
    watch.stop();
  });

  it("opens a new stream for another session without waiting", async () => {
    const fake = new FakeGateway();
    const { watch, connections } = open(fake, "");
    await vi.waitFor(() => expect(connections.at(-1)?.state).toBe("live"));
    watch.retarget({ sessionId: SESSION_ID, maxHz: 10 });
    await vi.waitFor(() => expect(fake.watchCalls.at(-1)?.sessionId).toBe(SESSION_ID));
    expect(connections.some(({ state }) => state === "reconnecting")).toBe(false);
    watch.stop();
  });

  it("tells of a session that the gateway does not know", async () => {
    const fake = new FakeGateway();
    const { watch, unknown } = open(fake, "01k000000000000000000gone0");
    await vi.waitFor(() => expect(unknown).toEqual(["01k000000000000000000gone0"]));
    await vi.waitFor(() => expect(fake.watchCalls.at(-1)?.sessionId).toBe(""));
    watch.stop();
  });

  it("stops for good", async () => {
    const fake = new FakeGateway();
    const { watch, connections } = open(fake);
    await vi.waitFor(() => expect(connections.at(-1)?.state).toBe("live"));
    const calls = fake.watchCalls.length;
    watch.stop();
    fake.restart();
    await new Promise((resolve) => setTimeout(resolve, 30));
    expect(fake.watchCalls).toHaveLength(calls);
  });
});
