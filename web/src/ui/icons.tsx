import type { ReactNode } from "react";
import { Severity } from "../gen/moe_debugger/v1/session_pb";

function Icon({ children, size = 16 }: { children: ReactNode; size?: number }) {
  return (
    <svg
      className="icon"
      width={size}
      height={size}
      viewBox="0 0 16 16"
      fill="none"
      stroke="currentColor"
      strokeWidth="1.5"
      strokeLinecap="round"
      strokeLinejoin="round"
      aria-hidden="true"
    >
      {children}
    </svg>
  );
}

export const PauseIcon = () => (
  <Icon>
    <path d="M5.5 3.5v9M10.5 3.5v9" strokeWidth="2" />
  </Icon>
);
export const PlayIcon = () => (
  <Icon>
    <path d="M5 3.2v9.6l7.5-4.8z" fill="currentColor" />
  </Icon>
);
export const MoonIcon = () => (
  <Icon>
    <path d="M13 9.5A5.5 5.5 0 0 1 6.5 3 5.5 5.5 0 1 0 13 9.5z" />
  </Icon>
);
export const SunIcon = () => (
  <Icon>
    <circle cx="8" cy="8" r="3" />
    <path d="M8 1.5v1.2M8 13.3v1.2M1.5 8h1.2M13.3 8h1.2M3.4 3.4l.9.9M11.7 11.7l.9.9M3.4 12.6l.9-.9M11.7 4.3l.9-.9" />
  </Icon>
);
export const SystemIcon = () => (
  <Icon>
    <circle cx="8" cy="8" r="5.5" />
    <path d="M8 2.5a5.5 5.5 0 0 1 0 11z" fill="currentColor" />
  </Icon>
);
export const TableIcon = () => (
  <Icon>
    <rect x="2" y="3" width="12" height="10" rx="1" />
    <path d="M2 6.5h12M2 9.8h12M6.5 3v10" />
  </Icon>
);
export const ChevronIcon = () => (
  <Icon size={12}>
    <path d="M4 6l4 4 4-4" />
  </Icon>
);
export const SearchIcon = () => (
  <Icon size={14}>
    <circle cx="7" cy="7" r="4.2" />
    <path d="M10.3 10.3l3.2 3.2" />
  </Icon>
);
export const LogoIcon = () => (
  <svg width="18" height="18" viewBox="0 0 16 16" aria-hidden="true">
    <g className="logo-cold">
      <rect x="1" y="1" width="4" height="4" rx=".5" />
      <rect x="11" y="1" width="4" height="4" rx=".5" opacity=".4" />
      <rect x="1" y="11" width="4" height="4" rx=".5" opacity=".4" />
      <rect x="6" y="1" width="4" height="4" rx=".5" opacity=".4" />
      <rect x="1" y="6" width="4" height="4" rx=".5" opacity=".4" />
    </g>
    <g className="logo-hot">
      <rect x="6" y="6" width="4" height="4" rx=".5" />
      <rect x="11" y="6" width="4" height="4" rx=".5" opacity=".5" />
      <rect x="6" y="11" width="4" height="4" rx=".5" opacity=".5" />
      <rect x="11" y="11" width="4" height="4" rx=".5" />
    </g>
  </svg>
);
export const ExpertsIcon = () => (
  <Icon size={20}>
    <rect x="2" y="2" width="5" height="5" rx="1" fill="currentColor" />
    <rect x="9" y="2" width="5" height="5" rx="1" />
    <rect x="2" y="9" width="5" height="5" rx="1" />
    <rect x="9" y="9" width="5" height="5" rx="1" fill="currentColor" />
  </Icon>
);
export const ConsoleIcon = () => (
  <Icon size={20}>
    <path d="M3 4l4 4-4 4M8.5 12.5H13" />
  </Icon>
);
export const TokensIcon = () => (
  <Icon size={20}>
    <path d="M2 4h5M9 4h5M2 8h8M12 8h2M2 12h3M7 12h6" strokeWidth="2" />
  </Icon>
);

export const PerformanceIcon = () => (
  <Icon>
    <path d="M2.5 12.5a5.8 5.8 0 1 1 11 0M8 10.5l3-4" />
  </Icon>
);
export const TrainingIcon = () => (
  <Icon size={20}>
    <path d="M2 2v12h12" />
    <path d="M4.5 4.5c1.5 5 3 6.5 9 7" />
  </Icon>
);

/** Severity is a shape and a word; the colour only repeats it. */
export function SeverityGlyph({ severity, size = 14 }: { severity: Severity; size?: number }) {
  if (severity === Severity.CRITICAL) {
    return (
      <svg className="glyph critical" width={size} height={size} viewBox="0 0 16 16" aria-hidden="true">
        <path d="M5 1h6l4 4v6l-4 4H5l-4-4V5z" fill="currentColor" />
        <path d="M5.5 5.5l5 5M10.5 5.5l-5 5" className="glyph-ink" />
      </svg>
    );
  }
  if (severity === Severity.WARNING) {
    return (
      <svg className="glyph warning" width={size} height={size} viewBox="0 0 16 16" aria-hidden="true">
        <path d="M8 1l7.5 13.5H.5z" fill="currentColor" />
        <path d="M8 6v4M8 12v.4" className="glyph-ink" />
      </svg>
    );
  }
  return (
    <svg className="glyph info" width={size} height={size} viewBox="0 0 16 16" aria-hidden="true">
      <circle cx="8" cy="8" r="6.7" fill="none" stroke="currentColor" strokeWidth="1.6" />
      <path d="M8 7.3v4M8 4.7v.4" stroke="currentColor" strokeWidth="1.8" strokeLinecap="round" />
    </svg>
  );
}
