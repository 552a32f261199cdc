// Names of layers. "L3" is the layer's index among all MoE layers, as everywhere in the fleet; where a model has more than
// one stack, or routes attention too, the name says which one it is.
import { i18n } from "./i18n";
import type { LayerShape } from "./model/load";

export interface LayerName {
  /** "L3", "dec L3", "L3 attn" */
  short: string;
  /** "decoder layer 1, attention"; empty where the index says all. */
  place: string;
  /** "Layer 3 · decoder layer 1, attention" */
  title: string;
}

const KNOWN_STACKS = new Set(["decoder", "encoder", "vision"]);
const cache = new WeakMap<readonly LayerShape[], LayerName[]>();

function stackWord(stack: string, form: "name" | "short"): string {
  if (KNOWN_STACKS.has(stack)) return i18n.t(`stack.${form}.${stack}`);
  return form === "name" ? stack : stack.slice(0, 4);
}

/** The name of each layer of a model, in the order of its layers. */
export function layerNames(layers: readonly LayerShape[]): LayerName[] {
  const known = cache.get(layers);
  if (known) return known;
  const stacks = new Set(layers.map(({ stack }) => stack));
  const isStackNamed = stacks.size > 1 || [...stacks].some((stack) => stack !== "decoder");
  const isSiteNamed = layers.some(({ isAttention }) => isAttention);
  const names = layers.map(({ layerIndex, modelLayerIndex, stack, isAttention }) => {
    const short = [
      isStackNamed ? stackWord(stack, "short") : "",
      `L${layerIndex}`,
      isAttention ? i18n.t("layer.site.short") : "",
    ];
    const place = [
      isStackNamed || isSiteNamed
        ? i18n.t("layer.inStack", { stack: stackWord(stack, "name"), index: modelLayerIndex })
        : "",
      isSiteNamed ? i18n.t(isAttention ? "layer.site.attention" : "layer.site.mlp") : "",
    ]
      .filter(Boolean)
      .join(", ");
    const title = i18n.t("layer.title", { layer: layerIndex });
    return { short: short.filter(Boolean).join(" "), place, title: place ? `${title} · ${place}` : title };
  });
  cache.set(layers, names);
  return names;
}

export function layerName(layers: readonly LayerShape[], row: number): LayerName {
  return layerNames(layers)[row] ?? { short: `L${row}`, place: "", title: i18n.t("layer.title", { layer: row }) };
}
