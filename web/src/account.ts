// The account of decisions in numbers, and words that several panels share.
import { ComponentState } from "./gen/moe_debugger/v1/gateway_pb";
import { type DropCounter, DropReason } from "./gen/moe_debugger/v1/routing_pb";
import type { Account } from "./gen/moe_debugger/v1/session_pb";

const sampledOut = (dropped: readonly DropCounter[]) =>
  dropped
    .filter(({ reason }) => reason === DropReason.SAMPLED_OUT)
    .reduce((sum, { numDecisions }) => sum + numDecisions, 0n);

export interface AccountNumbers {
  produced: bigint;
  counted: bigint;
  dropped: bigint;
  sampledOut: bigint;
  inFlight: bigint;
  missing: bigint;
  /** What produced = counted + dropped + in flight leaves over; never below 0, since counts may be newer than a status. */
  unexplained: bigint;
}

export function accountNumbers(account: Account | undefined): AccountNumbers {
  const dropped = (account?.dropped ?? []).reduce((sum, { numDecisions }) => sum + numDecisions, 0n);
  const sampled = sampledOut(account?.dropped ?? []);
  const produced = account?.numProduced ?? 0n;
  const counted = account?.numCounted ?? 0n;
  const inFlight = account?.numInFlight ?? 0n;
  const rest = produced - counted - dropped - inFlight;
  return {
    produced,
    counted,
    dropped: dropped - sampled,
    sampledOut: sampled,
    inFlight,
    missing: account?.numMissingMessages ?? 0n,
    unexplained: rest > 0n ? rest : 0n,
  };
}

export function componentClass(state: ComponentState): string {
  return state === ComponentState.READY ? "ready" : state === ComponentState.DOWN ? "down" : "starting";
}

export function formatSampling(rate: number): string {
  return rate >= 1 || rate <= 0 ? "1 : 1" : `1 : ${Number((1 / rate).toFixed(1))}`;
}
