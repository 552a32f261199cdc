import { type KeyboardEvent, type ReactNode, useRef } from "react";

export interface TabItem<T extends string> {
  id: T;
  label: ReactNode;
}

interface TabsProps<T extends string> {
  label: string;
  items: TabItem<T>[];
  selected: T;
  onSelect: (id: T) => void;
  className?: string;
  /** Prefix of the ids of tabs and of the panel that they control. */
  idPrefix: string;
}

/** A tab list with one tab stop: arrow keys move and select, Home and End jump. */
export function Tabs<T extends string>({
  label,
  items,
  selected,
  onSelect,
  className = "tabs",
  idPrefix,
}: TabsProps<T>) {
  const list = useRef<HTMLDivElement>(null);
  const onKeyDown = (event: KeyboardEvent) => {
    const at = items.findIndex(({ id }) => id === selected);
    const to =
      event.key === "ArrowRight"
        ? (at + 1) % items.length
        : event.key === "ArrowLeft"
          ? (at - 1 + items.length) % items.length
          : event.key === "Home"
            ? 0
            : event.key === "End"
              ? items.length - 1
              : -1;
    const item = items[to];
    if (!item) return;
    event.preventDefault();
    event.stopPropagation();
    onSelect(item.id);
    list.current?.querySelector<HTMLElement>(`#${idPrefix}-tab-${item.id}`)?.focus();
  };
  return (
    <div role="tablist" aria-label={label} className={className} ref={list} onKeyDown={onKeyDown}>
      {items.map(({ id, label: text }) => (
        <button
          type="button"
          role="tab"
          key={id}
          id={`${idPrefix}-tab-${id}`}
          aria-selected={id === selected}
          aria-controls={`${idPrefix}-panel`}
          tabIndex={id === selected ? 0 : -1}
          onClick={() => onSelect(id)}
        >
          {text}
        </button>
      ))}
    </div>
  );
}
