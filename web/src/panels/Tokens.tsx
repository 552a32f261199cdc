import { type FormEvent, type KeyboardEvent, memo, useEffect, useMemo, useRef } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { formatClock, formatFixed, formatInteger, formatPercent } from "../format";
import { i18n } from "../i18n";
import { layerName, layerNames } from "../layers";
import { decodePieces, type TokenText, visibleText } from "../model/pieces";
import { type Colouring, colourExperts, expertName, type Routes, slotsOf, topExpert } from "../model/routes";
import { useApp, useIsCountsOnly } from "../store";
import { expectedRows, type OpenRequest, piecesOf, useTokens } from "../tokens";

const MAX_DRAWN = 4000;

/** Prompt box, tokens coloured by expert, and the route of one token. */
export function TokensPanel({ isFull }: { isFull: boolean }) {
  const { t } = useTranslation();
  const request = useTokens((state) => (state.currentId ? state.requests[state.currentId] : undefined));
  const layers = useApp((state) => state.picture?.whole.layers);
  const row = useApp((state) => state.row);
  const isCountsOnly = useIsCountsOnly();
  return (
    <section className={`tokens ${isFull ? "full" : "compact"}`} aria-label={t("tokens.title")}>
      {isFull && <RequestList />}
      <div className="tokens-main">
        <header className="panel-head">
          <h2>{t("tokens.title")}</h2>
          <span className="muted">
            {t("tokens.colouredAt", { layer: layers ? layerName(layers, row).short : row })}
          </span>
          <span className="spacer" />
          {isFull && <LayerPicker />}
        </header>
        {isCountsOnly && (
          <p className="notice" data-testid="counts-only">
            {t("tokens.noRowsAtCounts")}
          </p>
        )}
        <PromptBox rows={isFull ? 4 : 2} />
        <RequestLine request={request} />
        <TokenRun request={request} />
      </div>
      <div className="tokens-side">
        <RoutePanel request={request} isFull={isFull} />
        {isFull && request?.routes && <RequestCounts routes={request.routes} />}
      </div>
    </section>
  );
}

function LayerPicker() {
  const { t } = useTranslation();
  const layers = useApp((state) => state.picture?.whole.layers);
  const row = useApp((state) => state.row);
  if (!layers || layers.length === 0) return null;
  return (
    <label className="inline-field">
      {t("tokens.layer")}
      <select className="select" value={row} onChange={(event) => useApp.setState({ row: Number(event.target.value) })}>
        {layers.map((layer, i) => (
          <option key={layer.layerIndex} value={i}>
            {layerNames(layers)[i]?.short}
          </option>
        ))}
      </select>
    </label>
  );
}

function PromptBox({ rows }: { rows: number }) {
  const { t } = useTranslation();
  const { generator } = useServices();
  const { prompt, maxNewTokens, temperature } = useTokens();
  const limit = useApp((state) => state.serverInfo?.maxPromptBytes ?? 0);
  const hasWorker = useApp((state) => state.serverInfo?.hasWorker ?? true);
  // Renders again with each change of a request.
  const isRunning = useTokens((state) => {
    const current = Object.values(state.requests).some(({ state: s }) => s === "waiting" || s === "generating");
    return current && generator.isRunning;
  });
  const numBytes = useMemo(() => new TextEncoder().encode(prompt).length, [prompt]);
  const isTooLong = limit > 0 && numBytes > limit;
  const canGenerate = hasWorker && prompt.length > 0 && !isTooLong && !isRunning;
  const submit = (event?: FormEvent) => {
    event?.preventDefault();
    if (canGenerate) void generator.generate(prompt, maxNewTokens, temperature);
  };
  return (
    <form className="prompt" onSubmit={submit} noValidate>
      <textarea
        data-testid="prompt"
        aria-label={t("tokens.prompt")}
        placeholder={hasWorker ? t("tokens.placeholder") : t("tokens.noWorker")}
        value={prompt}
        rows={rows}
        spellCheck={false}
        disabled={!hasWorker}
        aria-invalid={isTooLong}
        onChange={(event) => useTokens.setState({ prompt: event.target.value })}
        onKeyDown={(event: KeyboardEvent) => {
          if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
        }}
      />
      <div className="prompt-actions">
        <label className="inline-field">
          {t("tokens.max")}
          <input
            type="number"
            data-testid="max-tokens"
            min={1}
            max={512}
            value={maxNewTokens}
            onChange={(event) =>
              useTokens.setState({
                maxNewTokens: Math.max(1, Math.min(4096, Math.round(Number(event.target.value)) || 1)),
              })
            }
          />
        </label>
        <label className="inline-field" title={t("tokens.temperatureHint")}>
          {t("tokens.temperature")}
          <input
            type="number"
            data-testid="temperature"
            min={0}
            max={2}
            step={0.1}
            value={temperature}
            onChange={(event) =>
              useTokens.setState({ temperature: Math.max(0, Math.min(2, Number(event.target.value) || 0)) })
            }
          />
        </label>
        {isRunning ? (
          <button type="button" className="button" data-testid="stop" onClick={() => generator.stop()}>
            {t("tokens.stop")}
          </button>
        ) : (
          <button
            type="submit"
            className="button primary"
            data-testid="generate"
            disabled={!canGenerate}
            title={t("tokens.hint")}
          >
            {t("tokens.generate")}
          </button>
        )}
      </div>
      {isTooLong && (
        <p className="warning small" role="alert">
          {t("tokens.tooLong", { bytes: formatInteger(numBytes), limit: formatInteger(limit) })}
        </p>
      )}
    </form>
  );
}

/** What became of the request: its state, its rows, its error. */
function RequestLine({ request }: { request: OpenRequest | undefined }) {
  const { t } = useTranslation();
  const { generator } = useServices();
  if (!request) return null;
  const rows = request.routes?.numTokens ?? 0;
  const generated = request.generated.length;
  const expected = expectedRows(request.prompt.length, generated);
  const state = t(`tokens.${request.state}`, {
    n: generated,
    prompt: request.prompt.length,
    generated,
    seconds: formatFixed(request.durationS),
    rows,
  });
  const isOver = request.state !== "waiting" && request.state !== "generating";
  const routes =
    request.state === "waiting" || (expected === 0 && !request.routes)
      ? ""
      : request.isFinal
        ? t("tokens.rowsFinal", { rows: formatInteger(rows) })
        : t("tokens.rowsSoFar", { rows: formatInteger(rows), expected: formatInteger(Math.max(expected, rows)) });
  return (
    <div
      className="request-line small"
      data-testid="request-line"
      data-request-id={request.requestId}
      data-state={request.state}
      data-prompt-tokens={request.prompt.length}
      data-generated-tokens={generated}
      data-rows={rows}
      data-final={request.isFinal}
    >
      <span className="muted">
        {t("tokens.request", { id: `…${request.requestId.slice(-6)}` })} · {state} {routes && `· ${routes}`}
      </span>
      {isOver && !request.isFinal && request.sessionId && (
        <button type="button" className="link" onClick={() => generator.open(request.requestId)}>
          {t("tokens.checkAgain")}
        </button>
      )}
      {request.routes && request.routes.numRowsNotKept > 0 && (
        <span className="warning">{t("tokens.notKept", { n: formatInteger(request.routes.numRowsNotKept) })}</span>
      )}
      {request.error && (
        <p className="error-line" role="alert">
          <b>{t([`generateError.${request.error.code}`, "generateError.other"])}</b>{" "}
          <span>
            {request.error.message} <span className="num muted">({request.error.code})</span>
          </span>
        </p>
      )}
      {request.routesError && <p className="warning">{request.routesError}</p>}
    </div>
  );
}

function spokenExpert(layer: { numExperts: number }, expert: number): string {
  const name = expertName(layer, expert);
  return expert < layer.numExperts ? name : i18n.t("tokens.zeroExpert", { name });
}

interface Drawn {
  position: number;
  tokenId: number | undefined;
  text: TokenText;
  isPrompt: boolean;
}

function TokenRun({ request }: { request: OpenRequest | undefined }) {
  const { t } = useTranslation();
  const row = useApp((state) => state.row);
  const layerIndex = useApp((state) => state.picture?.whole.layers[state.row]?.layerIndex ?? state.row);
  const selected = useTokens((state) => state.position);
  const box = useRef<HTMLDivElement>(null);
  const colours = useRef<{ key: string; map: Map<number, number> }>({ key: "", map: new Map() });
  const routes = request?.routes ?? null;
  const layer = routes?.layers.find((candidate) => candidate.layerIndex === layerIndex) ?? routes?.layers[row];

  const colouring = useMemo<Colouring>(() => {
    const key = `${request?.requestId}/${layer?.layerIndex}`;
    const result = colourExperts(
      layer,
      routes?.numTokens ?? 0,
      colours.current.key === key ? colours.current.map : undefined,
    );
    colours.current = { key, map: result.colourOf };
    return result;
  }, [layer, routes, request?.requestId]);

  const { drawn, numHidden, isWithoutText } = useMemo(() => {
    if (!request) return { drawn: [] as Drawn[], numHidden: 0, isWithoutText: false };
    const { pieces, numPrompt } = piecesOf(request);
    const texts = decodePieces(pieces.map(({ bytes }) => bytes ?? new Uint8Array()));
    const all = pieces.map((piece, position) => ({
      position,
      tokenId: piece.tokenId ?? undefined,
      text: texts[position] as TokenText,
      isPrompt: position < numPrompt,
    }));
    const hidden = Math.max(0, all.length - MAX_DRAWN);
    return {
      drawn: all.slice(hidden),
      numHidden: hidden,
      isWithoutText: pieces.length > 0 && pieces.every(({ bytes }) => bytes === null),
    };
  }, [request]);

  // The newest token stays in view while the text grows.
  const isGrowing = request?.state === "generating";
  // biome-ignore lint/correctness/useExhaustiveDependencies: each new token scrolls
  useEffect(() => {
    if (isGrowing && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [isGrowing, drawn.length]);

  if (!request || drawn.length === 0) {
    return (
      <p className="empty-line muted token-empty">{request && request.state !== "reopened" ? "" : t("tokens.empty")}</p>
    );
  }
  const move = (event: KeyboardEvent) => {
    const delta = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (!delta) return;
    event.preventDefault();
    const first = drawn[0]?.position ?? 0;
    const last = drawn.at(-1)?.position ?? 0;
    const to = Math.max(first, Math.min(last, (selected ?? first - delta) + delta));
    useTokens.setState({ position: to });
    box.current?.querySelector<HTMLElement>(`[data-position="${to}"]`)?.focus();
  };
  return (
    <>
      {numHidden > 0 && (
        <p className="muted small">
          {t("tokens.truncated", { shown: formatInteger(MAX_DRAWN), n: formatInteger(numHidden + MAX_DRAWN) })}
        </p>
      )}
      {isWithoutText && <p className="muted small">{t("tokens.noText")}</p>}
      <div
        className="token-text"
        dir="ltr"
        ref={box}
        role="toolbar"
        aria-label={t("tokens.text")}
        data-testid="tokens"
        onKeyDown={move}
      >
        {drawn.map((token, i) => {
          const routeRow = routes?.rowOfPosition.get(token.position);
          const expert = layer && routeRow !== undefined ? topExpert(layer, routeRow) : null;
          return (
            <TokenSpan
              key={token.position}
              position={token.position}
              tokenId={token.tokenId}
              kind={token.text.kind}
              text={token.text.text}
              isPrompt={token.isPrompt}
              isFirstGenerated={!token.isPrompt && (drawn[i - 1]?.isPrompt ?? false)}
              expert={expert}
              expertName={expert !== null && layer ? spokenExpert(layer, expert) : ""}
              colour={expert === null ? -2 : (colouring.colourOf.get(expert) ?? -1)}
              isSelected={selected === token.position}
              isTabStop={selected === token.position || (selected === null && i === 0)}
              isWithoutExpert={expert === null && routeRow !== undefined}
              isUnrouted={routeRow === undefined && request.isFinal}
            />
          );
        })}
      </div>
      <ul className="token-legend">
        {colouring.top.map(({ expert, share, colour }) => (
          <li key={expert}>
            <span className={`swatch token-colour-${colour}`} />
            <b className="num">{layer ? expertName(layer, expert) : `E${expert}`}</b>{" "}
            <span className="muted num">{formatPercent(share)}</span>
          </li>
        ))}
        {colouring.numOthers > 0 && (
          <li>
            <span className="swatch token-colour-other" />
            <span className="muted">
              {t("tokens.others", { count: colouring.numOthers, share: formatPercent(colouring.otherShare) })}
            </span>
          </li>
        )}
      </ul>
    </>
  );
}

interface TokenSpanProps {
  position: number;
  tokenId: number | undefined;
  kind: TokenText["kind"];
  text: string;
  isPrompt: boolean;
  isFirstGenerated: boolean;
  expert: number | null;
  /** "E3", "zero expert Z0"; empty without an expert. */
  expertName: string;
  colour: number;
  isSelected: boolean;
  isTabStop: boolean;
  /** Its route is there, and holds no expert at this layer. */
  isWithoutExpert: boolean;
  isUnrouted: boolean;
}

const TokenSpan = memo(function TokenSpan(props: TokenSpanProps) {
  const { t } = useTranslation();
  const { position, tokenId, kind, text, expert, colour } = props;
  const label = visibleText({ kind, text }, tokenId);
  const isBreak = kind === "text" && text.endsWith("\n");
  const isPlain = kind === "text" && text.trim() !== "" && !/\p{Cc}/u.test(text);
  const shown = kind === "special" && tokenId === undefined ? `${position} ` : isPlain || text === " " ? text : label;
  const state =
    expert !== null
      ? props.expertName
      : t(props.isUnrouted ? "tokens.notRouted" : props.isWithoutExpert ? "tokens.noExpert" : "tokens.routePending");
  const part = kind === "part" ? ` ${t("tokens.partOf", { text })}` : "";
  const tone = colour === -2 ? "none" : colour === -1 ? "other" : String(colour);
  return (
    <>
      {props.isFirstGenerated && <span className="generated-mark" aria-hidden="true" />}
      <button
        type="button"
        className={`token token-colour-${tone}${props.isPrompt ? " is-prompt" : ""}${isPlain || text === " " ? "" : " is-mark"}`}
        data-position={position}
        data-expert={expert ?? undefined}
        aria-pressed={props.isSelected}
        aria-label={t("tokens.tokenLabel", { position, text: label, expert: state })}
        title={`#${position} ${label}${part} · ${state}`}
        tabIndex={props.isTabStop ? 0 : -1}
        onClick={() => useTokens.setState({ position: props.isSelected ? null : position })}
      >
        {shown}
      </button>
      {isBreak && <br />}
    </>
  );
});

/** Short names of the layers that routes speak of. */
function useLayerName(): (layerIndex: number) => string {
  const layers = useApp((state) => state.picture?.whole.layers);
  return (layerIndex) => {
    const row = layers?.findIndex((layer) => layer.layerIndex === layerIndex) ?? -1;
    return layers && row >= 0 ? layerName(layers, row).short : `L${layerIndex}`;
  };
}

function RoutePanel({ request, isFull }: { request: OpenRequest | undefined; isFull: boolean }) {
  const { t } = useTranslation();
  const position = useTokens((state) => state.position);
  const selectedRow = useApp((state) => state.row);
  const routes = request?.routes;
  const routeRow = position === null ? undefined : routes?.rowOfPosition.get(position);
  const nameOfLayer = useLayerName();
  const name = useMemo(() => {
    if (!request || position === null) return "";
    const { pieces } = piecesOf(request);
    const texts = decodePieces(pieces.map(({ bytes }) => bytes ?? new Uint8Array()));
    const text = texts[position];
    return text ? visibleText(text, pieces[position]?.tokenId ?? undefined) : "";
  }, [request, position]);
  return (
    <div className="route">
      <header className="panel-head">
        <h2>
          {position === null ? t("tokens.routeOfNone") : t("tokens.route")}{" "}
          {position !== null && <code dir="ltr">{name}</code>}
        </h2>
        {position !== null && routes?.layers[0] && (
          <span className="muted num">{t("tokens.routeHint", { position, topK: routes.layers[0].topK })}</span>
        )}
      </header>
      {position === null || !routes ? (
        <p className="empty-line muted">{t("tokens.routeEmpty")}</p>
      ) : routeRow === undefined ? (
        <p className="empty-line muted">{request?.isFinal ? t("tokens.notRouted") : t("tokens.routePending")}</p>
      ) : (
        <>
          <RoutePlot routes={routes} row={routeRow} />
          {(isFull || routes.layers.length <= 8) && (
            <table className="route-table" data-testid="route-table" data-position={position}>
              <caption className="visually-hidden">{t("tokens.experts")}</caption>
              <tbody>
                {routes.layers.map((layer, i) => (
                  <tr key={layer.layerIndex} className={i === selectedRow ? "selected" : undefined}>
                    <th scope="row" className="num">
                      <button type="button" className="link" onClick={() => useApp.setState({ row: i })}>
                        {nameOfLayer(layer.layerIndex)}
                      </button>
                    </th>
                    <td>
                      {slotsOf(layer, routeRow).length === 0 && <span className="muted">{t("tokens.noExpert")}</span>}
                      {slotsOf(layer, routeRow).map(({ expert, weight }) => (
                        <span className="slot num" key={expert}>
                          <b title={spokenExpert(layer, expert)}>{expertName(layer, expert)}</b> {formatFixed(weight)}
                          <span className="weight" aria-hidden="true">
                            <span style={{ inlineSize: `${Number.isNaN(weight) ? 0 : Math.min(1, weight) * 100}%` }} />
                          </span>
                        </span>
                      ))}
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          )}
        </>
      )}
    </div>
  );
}

function RoutePlot({ routes, row }: { routes: Routes; row: number }) {
  const { t } = useTranslation();
  const nameOfLayer = useLayerName();
  const selectedRow = useApp((state) => state.row);
  const width = 380;
  const height = 96;
  const left = 30;
  const slots = routes.layers.map((layer) => slotsOf(layer, row));
  // Zero experts come after the routed ones.
  const maxExperts = Math.max(
    ...routes.layers.map((layer) => layer.numExperts),
    ...slots.flatMap((own) => own.map(({ expert }) => expert + 1)),
  );
  const x = (i: number) => left + ((i + 0.5) / routes.layers.length) * (width - left - 6);
  const y = (expert: number) => 8 + (expert / Math.max(1, maxExperts - 1)) * (height - 28);
  const line = slots
    .flatMap((own, i) => (own[0] ? [`${x(i).toFixed(1)} ${y(own[0].expert).toFixed(1)}`] : []))
    .join("L");
  const nameOf = (i: number, expert: number) => expertName(routes.layers[i] ?? { numExperts: maxExperts }, expert);
  const each = Math.ceil(routes.layers.length / 8);
  const summary = slots
    .map(
      (own, i) =>
        `${nameOfLayer(routes.layers[i]?.layerIndex ?? i)}: ${own.map(({ expert }) => nameOf(i, expert)).join(" ")}`,
    )
    .join(", ");
  return (
    <svg
      className="route-plot"
      viewBox={`0 0 ${width} ${height}`}
      role="img"
      aria-label={`${t("tokens.route")} ${summary}`}
    >
      <rect className="route-selected" x={x(selectedRow) - 9} width={18} y={2} height={height - 18} rx={3} />
      {[0, Math.floor((maxExperts - 1) / 2), maxExperts - 1].map((expert) => (
        <g key={expert}>
          <line className="grid" x1={left} x2={width} y1={y(expert)} y2={y(expert)} />
          <text className="tick" x={left - 5} y={y(expert) + 3.5} textAnchor="end">
            E{expert}
          </text>
        </g>
      ))}
      {line && <path className="line min" d={`M${line}`} />}
      {slots.map((own, i) =>
        own.map(({ expert, weight }, rank) => (
          <circle
            key={`${routes.layers[i]?.layerIndex}/${expert}`}
            className={rank === 0 ? "dot top" : "dot"}
            cx={x(i)}
            cy={y(expert)}
            r={rank === 0 ? 4 : 2 + 2 * (Number.isNaN(weight) ? 0 : weight)}
          />
        )),
      )}
      {routes.layers.map((layer, i) =>
        i % each === 0 ? (
          <text className="tick" key={layer.layerIndex} x={x(i)} y={height - 3} textAnchor="middle">
            {routes.layers.length <= 16 ? nameOfLayer(layer.layerIndex) : `L${layer.layerIndex}`}
          </text>
        ) : null,
      )}
    </svg>
  );
}

function RequestList() {
  const { t } = useTranslation();
  const { generator } = useServices();
  const { list, listError, currentId } = useTokens();
  const known = useTokens((state) => state.requests);
  const isCountsOnly = useIsCountsOnly();
  const textOf = (requestId: string) => {
    const request = known[requestId];
    if (!request || request.prompt.length === 0) return "";
    return new TextDecoder().decode(Uint8Array.from(request.prompt.slice(0, 60).flatMap(({ bytes }) => [...bytes])));
  };
  return (
    <nav className="request-list" aria-label={t("tokens.requests")}>
      <header className="panel-head">
        <h2>{t("tokens.requests")}</h2>
        <span className="muted num">{list.length || ""}</span>
      </header>
      {listError && <p className="warning small">{listError}</p>}
      {list.length === 0 && !listError && (
        <p className="empty-line muted">{t(isCountsOnly ? "tokens.noRequestsAtCounts" : "tokens.requestsEmpty")}</p>
      )}
      <ul>
        {list.map((item) => (
          <li key={item.requestId}>
            <button
              type="button"
              aria-current={item.requestId === currentId}
              disabled={!item.hasRoutes}
              data-testid="request"
              data-request-id={item.requestId}
              data-tokens={String(item.numTokens)}
              onClick={() => generator.open(item.requestId)}
            >
              <span className="request-text">
                {textOf(item.requestId) || <span className="num">…{item.requestId.slice(-8)}</span>}
              </span>
              <span className="num muted">
                {formatClock(item.firstSeenAtUnixNs)} ·{" "}
                {item.hasRoutes
                  ? t("tokens.requestTokens", { n: formatInteger(item.numTokens) })
                  : t("tokens.noRoutes")}
              </span>
            </button>
          </li>
        ))}
      </ul>
    </nav>
  );
}

function RequestCounts({ routes }: { routes: Routes }) {
  const { t } = useTranslation();
  const nameOfLayer = useLayerName();
  const numExperts = Math.max(0, ...routes.layers.map((layer) => layer.numExperts));
  if (numExperts > 64) return null;
  return (
    <div className="request-counts">
      <header className="panel-head">
        <h2>{t("tokens.counts")}</h2>
      </header>
      <div className="table-scroll">
        <table className="numbers">
          <caption className="visually-hidden">{t("table.request")}</caption>
          <thead>
            <tr>
              <th scope="col">{t("table.layer")}</th>
              {Array.from({ length: numExperts }, (_, expert) => (
                // biome-ignore lint/suspicious/noArrayIndexKey: the index is the expert's id
                <th scope="col" key={expert}>
                  E{expert}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {routes.layers.map((layer) => (
              <tr key={layer.layerIndex}>
                <th scope="row">{nameOfLayer(layer.layerIndex)}</th>
                {Array.from(layer.expertCounts, (count, expert) => (
                  <td
                    // biome-ignore lint/suspicious/noArrayIndexKey: the index is the expert's id
                    key={expert}
                    data-testid="request-expert-cell"
                    data-layer={layer.layerIndex}
                    data-expert={expert}
                    data-count={count}
                    className={count === 0 ? "zero" : undefined}
                  >
                    {formatInteger(count)}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </div>
  );
}
