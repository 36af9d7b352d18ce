#!/usr/bin/env -S bun --config=/dev/null --env-file=/dev/null --tsconfig-override=/dev/null
// btrfs-backup: incremental backups of btrfs subvolumes. The README says what it does for
// whom; this file is all of the program, in nine sections, each using only those above it.

import { AsyncLocalStorage } from "node:async_hooks";
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  fstatSync,
  lstatSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  readSync,
  realpathSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { constants as osConstants, tmpdir } from "node:os";
import { basename, dirname, join, normalize, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import type { ArgDef, ArgsDef, CommandDef } from "citty";
import type { ProcessPromise } from "zx/core";

/** The same as in package.json; here, so that this file runs alone. */
export const VERSION = "1.0.0";

/** What scripts/build builds; nothing in the source itself. */
declare const BUILT_FROM: string | undefined;
/** Version, commit and runtime. */
function versionText(): string {
  const { bun, deno, node } = process.versions as Record<string, string | undefined>;
  const runtime =
    deno !== undefined ? `Deno ${deno}` : bun !== undefined ? `Bun ${bun}` : `Node ${node}`;
  return `btrfs-backup ${VERSION} (${typeof BUILT_FROM === "string" ? BUILT_FROM : "from source"}, ${runtime})`;
}

// ── 1. Vocabulary ────────────────────────────────────────────────────────────────────────

/** A subvolume as `btrfs subvolume list` shows it; `path` counts from the filesystem's top level. */
export type Subvolume = {
  /** Grows with time on its filesystem, whatever the clock does. */
  readonly id: number;
  readonly path: string;
  readonly uuid: string;
  readonly parentUuid: string | null;
  readonly receivedUuid: string | null;
  readonly readonly: boolean;
  /** The generation of its creation, where it is told. */
  readonly cgen?: number;
};

/** The name of something directly in a folder: never empty, `.`, `..`, nor with a slash, a NUL or a line break. Only `entryName` makes one. */
export type EntryName = string & { readonly type: "name of an entry" };

/** The name of an entry; null for what can be none. */
export function entryName(text: string): EntryName | null {
  const isOne = text !== "" && text !== "." && text !== ".." && !/[/\n\r\0]/.test(text);
  return isOne ? (text as EntryName) : null;
}

/**
 * A subvolume standing directly in a folder, under `name`; `moment`: when that was, in ms since 1970, where the place says it. `belated`: a
 * later one was there when it came, which it can have been received as a difference to.
 */
export type Entry = Subvolume & {
  readonly name: EntryName;
  readonly moment: number | null;
  readonly belated?: true;
};

/** An entry that is ours by its name; `time` is the name's wall clock, in ms, as if it were UTC. */
export type Snapshot = Entry & { readonly time: number; readonly moment: number };

/**
 * A stored stream, as the backup that it gives. The object's name stands for its path and UUID, the stream
 * that it builds on for its parent, and `readonly` means that it can be restored: it and all of those are complete.
 */
export type Stream = Entry & {
  readonly moment: number;
  readonly bytes: number;
  readonly owner: Owner;
  /** The UUID that the parent's data goes by; null for a full stream. */
  readonly from: string | null;
  readonly compressed: boolean;
  readonly encrypted: boolean;
  /** It has a checksum object. */
  readonly summed: boolean;
  /** It was stored to its end. */
  readonly stored: boolean;
};

/** What a destination holds of a snapshot. The same facts, seen from the other side. */
export type Backup = Snapshot;

/**
 * What a stream's name says of its owner: the UUID of the source subvolume; a digest of its host and path; and one
 * of the first UUID that it had, which stays the same when the source is restored, and goes on with its streams.
 */
export type Owner = { readonly uuid: string; readonly place: string; readonly lineage: string };

/** What a record says of a chain's owner. `uuid` is the filesystem's where the subvolume has none. */
export type Identity = { readonly uuid: string; readonly host: string; readonly path: string };

/** One stream to send: `snapshot` in full, or as the difference to `parent`. `why`: why not as the difference to what is nearest; `belated`: a later one is there already, and may be the parent. */
export type Transfer = {
  readonly snapshot: Snapshot;
  readonly parent: Snapshot | null;
  readonly why?: string | undefined;
  readonly belated?: true;
};

/** The snapshot of the last stream that a command took; it may be gone. */
export type Memory = { readonly name: string; readonly uuid: string };

/** A name at a destination that is taken by something that is not this snapshot's data. */
export type Conflict = { readonly name: string; readonly uuid: string; readonly why: string };

/** What to keep: nothing is dropped without one. Counts are Infinity for `*`. */
export type Policy = {
  readonly text: string;
  readonly newest: number;
  readonly firstOf: readonly { readonly unit: Unit; readonly count: number }[];
  readonly within: readonly { readonly unit: Unit; readonly count: number }[];
};
export type Unit = keyof typeof UNITS;

/** Something went wrong that the user can read about in `message`: exit status 1. */
export class Failure extends Error {}
/** The command line makes no sense: exit status 2, and nothing was done. */
export class UsageError extends Error {}
/** Another run holds the lock: exit status 3 for a source, a failure for a destination. */
export class Busy extends Error {}
/** A place is not there just now, which is normal for an `--optional` destination. */
export class Absent extends Failure {}
/** Not even what a place would be made in is there. */
class Missing extends Absent {}
/** A host cannot be reached, or no more. */
export class Unreachable extends Absent {}
/** The stream is not the one that a part of was kept. */
class OtherStream extends Failure {}
/** It did nothing for too long, and was ended, or left alone if it does not end: nothing more is done there. */
class Stuck extends Failure {}
/** A pipeline was killed, and did not fail by itself. */
class Killed extends Failure {}
/** The name is taken. */
class Taken extends Failure {}
/** A restore was interrupted when it had begun to change names: see FINISH. */
class Unfinished extends Failure {}
/** Another restore has the names of this second. */
class SameSecond extends Failure {}
/** What has been told already. */
class AlreadyTold extends Failure {}
/** The transfer's receiving side has no space left. */
export class NoSpace extends Failure {}
/** What the receiving side has as the parent is not what the difference was made against. */
export class BadParent extends Failure {}
/** Something that a guarded key may not do: told in one line, and logged. */
export class Refused extends Failure {}
/** A signal ended the run. */
export class Interrupted extends Error {
  constructor(readonly signal: NodeJS.Signals) {
    super(`interrupted by ${signal}`);
  }
}

/** What a command tells: log lines to people, events to programs; and whether anything failed. */
export type Report = {
  failed: boolean;
  /** How many events of each kind there were. */
  readonly tally: Record<string, number>;
  /** What was done at each place; null is the source. */
  readonly places: Map<string | null, PlaceMetrics>;
  readonly event: (event: string, fields: Record<string, unknown>) => void;
  readonly warning: (message: string) => void;
  readonly error: (destination: string | null, error: unknown) => void;
};

/** Map.groupBy, which Node 20 has not. */
function groupBy<K, T>(all: readonly T[], keyOf: (one: T) => K): Map<K, T[]> {
  const groups = new Map<K, T[]>();
  for (const one of all) {
    const group = groups.get(keyOf(one));
    if (group === undefined) groups.set(keyOf(one), [one]);
    else group.push(one);
  }
  return groups;
}

/**
 * Text as a person sees it, whoever wrote it: what would move a terminal's cursor, change its title or turn text around stands as
 * an escape (C0 but for the line break, C1, and Unicode's bidirectional controls). All that is shown passes here; JSON escapes by itself.
 */
export const visible = (text: string) =>
  text.replace(
    /[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );

/** Shows a command's result. */
const print = (text: string) => void process.stdout.write(visible(text));

const two = (n: number) => String(n).padStart(2, "0");

/** `YYYYMMDD-HHMMSS` of a date in local time. */
export function stamp(date: Date): string {
  const day = `${String(date.getFullYear()).padStart(4, "0")}${two(date.getMonth() + 1)}${two(date.getDate())}`;
  return `${day}-${two(date.getHours())}${two(date.getMinutes())}${two(date.getSeconds())}`;
}

/** The wall clock of a local date, counted like a snapshot's `time`. */
export const wallClock = (date: Date) => parseName(stamp(date), "") as number;

/** When a local clock showed `time`, in ms since 1970; the second time, if it did so twice and the first was before `earliest`. */
export function momentOf(time: number, earliest = -Infinity): number {
  const utc = new Date(time);
  // The calendar is the same every 400 years, and Date takes years below 100 for those of the 20th century.
  const shift = utc.getUTCFullYear() < 100 ? 400 : 0;
  const local = new Date(
    utc.getUTCFullYear() + shift,
    utc.getUTCMonth(),
    utc.getUTCDate(),
    utc.getUTCHours(),
    utc.getUTCMinutes(),
    utc.getUTCSeconds(),
  );
  const first = local.getTime() - shift * (146_097 / 400) * DURATION.d;
  const again =
    first >= earliest
      ? undefined
      : [30, 60]
          .map((minutes) => first + minutes * 60e3)
          .find((later) => wallClock(new Date(later)) === time);
  return again ?? first;
}

/** The time in a snapshot's name, or null if the name is not exactly PREFIX and a real date. */
export function parseName(name: string, prefix: string): number | null {
  const text = name.slice(prefix.length);
  if (!name.startsWith(prefix) || !/^\d{8}-\d{6}$/.test(text)) return null;
  const [date, time] = [Number(text.slice(0, 8)), Number(text.slice(9))];
  const year = Math.floor(date / 10_000) + 400; // as in `momentOf`
  const [month, day] = [Math.floor(date / 100) % 100, date % 100];
  const [hour, minute, second] = [
    Math.floor(time / 10_000),
    Math.floor(time / 100) % 100,
    time % 100,
  ];
  if (month < 1 || month > 12 || day < 1 || hour > 23 || minute > 59 || second > 59) return null;
  if (day > 28 && day > new Date(Date.UTC(year, month, 0)).getUTCDate()) return null;
  return Date.UTC(year, month - 1, day, hour, minute, second) - 146_097 * DURATION.d;
}

const digestOf = (text: string) => createHash("sha256").update(text).digest("hex");

/** What can stand before the date. */
const isPrefix = (text: string) => !/[/\x00-\x1f\x7f]/.test(text) && Buffer.byteLength(text) <= 200;

/** What a name begins with that ends in a date as ours do; null for all others. */
const prefixOf = (name: string) => (timeIn(name) === null ? null : name.slice(0, -15));

/** The time in a name with whatever prefix. */
const timeIn = (name: string) => parseName(name, name.slice(0, -15));

/**
 * Finds, among subvolumes of one place, the one that holds a snapshot's data. UUIDs decide, never
 * names: it was received from the snapshot, or from where the snapshot was, or the snapshot from it.
 */
export function dataFinder<T extends Subvolume>(
  held: readonly T[],
): (snapshot: Subvolume) => T | undefined {
  const received = new Map<string, T>();
  for (const one of held) if (one.receivedUuid !== null) received.set(one.receivedUuid, one);
  let own: Map<string, T> | undefined; // mostly not needed
  return ({ uuid, receivedUuid }) =>
    received.get(uuid) ??
    (receivedUuid === null
      ? undefined
      : (received.get(receivedUuid) ?? (own ??= byUuid(held)).get(receivedUuid)));
}

/** `btrfs receive` sets both, as its last act. */
export const isComplete = (backup: Subvolume) => backup.readonly && backup.receivedUuid !== null;

/** In ms. */
const DURATION = { h: 3600e3, d: 86400e3 } as const;

/** The moment so many months before a time. */
function monthsBefore(time: number, count: number): number {
  const date = new Date(time);
  const day = date.getUTCDate();
  date.setUTCDate(1);
  date.setUTCMonth(date.getUTCMonth() - count);
  // A month before the 31st is the last day of a shorter month, not the first days of the next.
  const last = new Date(Date.UTC(date.getUTCFullYear(), date.getUTCMonth() + 1, 0)).getUTCDate();
  date.setUTCDate(Math.min(day, last));
  return Number.isNaN(date.getTime()) ? -Infinity : date.getTime();
}

/**
 * A unit of policies and durations: its noun; the number of the period that a wall-clock time lies in, counted from
 * 1970; and the moment `count` of them before a time.
 */
type UnitOfTime = {
  readonly noun: string;
  readonly period: (time: number) => number;
  readonly before: (time: number, count: number) => number;
};
const UNITS = {
  h: {
    noun: "hour",
    period: (time) => Math.floor(time / DURATION.h),
    before: (time, count) => time - count * DURATION.h,
  },
  d: {
    noun: "day",
    period: (time) => Math.floor(time / DURATION.d),
    before: (time, count) => time - count * DURATION.d,
  },
  w: {
    noun: "week",
    // ISO weeks begin on Monday, and 1970-01-01 was a Thursday.
    period: (time) => Math.floor((Math.floor(time / DURATION.d) + 3) / 7),
    before: (time, count) => time - count * 7 * DURATION.d,
  },
  m: {
    noun: "month",
    period: (time) => new Date(time).getUTCFullYear() * 12 + new Date(time).getUTCMonth(),
    before: monthsBefore,
  },
  y: {
    noun: "year",
    period: (time) => new Date(time).getUTCFullYear(),
    before: (time, count) => monthsBefore(time, count * 12),
  },
} as const satisfies Record<string, UnitOfTime>;

const LETTERS = Object.keys(UNITS);

/** The number of the period that a wall-clock time lies in. */
const period = (time: number, unit: Unit) => UNITS[unit].period(time);

/** The moment `count` units before `time`. */
export const before = (time: number, count: number, unit: Unit) =>
  count === Infinity ? -Infinity : UNITS[unit].before(time, count);

const POLICY_WORD = new RegExp(`^(\\d+|\\*)([${LETTERS.join("")}]?)(\\+?)$`);
const DURATION_WORD = new RegExp(`^(\\d+)([${LETTERS.join("")}])$`);

/** Reads a POLICY; null is "keep everything" (`0`). */
export function parsePolicy(text: string): Policy | null {
  if (text.trim() === "0") return null;
  const seen = new Set<string>();
  const policy = {
    text,
    newest: 0,
    firstOf: [] as Policy["firstOf"][number][],
    within: [] as Policy["within"][number][],
  };
  for (const word of text
    .trim()
    .replace(/^\+(?=\d+$)/, "")
    .split(/\s+/)) {
    const match = POLICY_WORD.exec(word);
    const count = match?.[1] === "*" ? Infinity : Number(match?.[1]);
    const [, , unit = "", plus = ""] = match ?? [];
    if (
      !match ||
      count === 0 ||
      !Number.isSafeInteger(count === Infinity ? 0 : count) ||
      (unit === "" && (plus !== "" || count === Infinity))
    )
      throw new UsageError(
        `"${word}" is not a retention policy: a number, or words like 24h 7d 4w 12m 10y 14d+`,
      );
    if (seen.has(unit + plus))
      throw new UsageError(
        `retention policy "${text}" says "${unit === "" ? "a number" : unit + plus}" twice`,
      );
    seen.add(unit + plus);
    if (unit === "") policy.newest = count;
    else (plus ? policy.within : policy.firstOf).push({ unit: unit as Unit, count });
  }
  return policy;
}

/** Reads a DURATION like `3d`. */
export function parseDuration(text: string): { count: number; unit: Unit } {
  const match = DURATION_WORD.exec(text);
  if (!match)
    throw new UsageError(
      `"${text}" is not a duration: a number with ${LETTERS.slice(0, -1).join(", ")} or ${LETTERS.at(-1)}`,
    );
  return { count: Number(match[1]), unit: match[2] as Unit };
}

/** Bytes with k, m or g for powers of 1024; null for any other text, and for none. */
function bytesIn(text: string): number | null {
  const [, number = "", unit = ""] = /^(\d+(?:\.\d+)?)([kmg]?)$/i.exec(text) ?? [];
  const bytes = Math.floor(Number(number) * 1024 ** " kmg".indexOf(unit.toLowerCase() || " "));
  return bytes < 1 || bytes > Number.MAX_SAFE_INTEGER ? null : bytes;
}

/** Reads a RATE in bytes a second, with k, m or g for powers of 1024. */
export function parseRate(text: string): number {
  const rate = bytesIn(text);
  if (rate === null)
    throw new UsageError(
      `"${text}" is not a rate: bytes a second, with k, m or g for powers of 1024`,
    );
  return rate;
}

/** Reads a SIZE in bytes, with k, m or g for powers of 1024. */
export function parseSize(text: string): number {
  const bytes = bytesIn(text);
  if (bytes === null)
    throw new UsageError(`"${text}" is not a size: bytes, with k, m or g for powers of 1024`);
  return bytes;
}

/** When a stored chain ends: after a number of streams, or a time; never for 0. */
export type FullEvery = { readonly count: number; readonly unit: Unit | null };

/** Reads the value of --full-every. */
export function parseFullEvery(text: string): FullEvery {
  const [, number = "", unit = ""] = DURATION_WORD.exec(text) ?? /^(\d+)()$/.exec(text) ?? [];
  if (!/^\d{1,9}$/.test(number) || (unit !== "" && Number(number) === 0))
    throw new UsageError(
      `"${text}" says not when a chain ends: a number of streams, a duration like 30d, or 0 for never`,
    );
  return { count: Number(number), unit: unit === "" ? null : (unit as Unit) };
}

/** Reads `zstd[:LEVEL]`, and returns the level. */
export function parseCompression(text: string): string {
  const level = /^zstd(?::([1-9]|1[0-9]))?$/.exec(text);
  if (!level) throw new UsageError(`"${text}" is no compression: zstd, or zstd:LEVEL with 1 to 19`);
  return level[1] ?? "3";
}

/** A place a user can name. `id` tells it from others and is what records call it. */
export type Location =
  Readable | { readonly kind: "shell"; readonly id: string; readonly command: string };
/** What can be looked at: a btrfs folder, a folder of stored streams, or such a remote of rclone, whose `path` names it to rclone. */
export type Readable = {
  readonly kind: "folder" | "raw" | "rclone";
  readonly id: string;
  readonly host: HostName | null;
  readonly path: string;
};
export type HostName = {
  readonly user: string | null;
  readonly name: string;
  readonly port: string | null;
};

/** Reads a SOURCE or LOCATION; relative paths count from the current directory. */
export function parseLocation(text: string): Location {
  if (text.startsWith("shell://")) {
    const command = text.slice("shell://".length);
    if (command.trim() === "") throw new UsageError("shell:// needs a command");
    return { kind: "shell", id: text, command };
  }
  const [, scheme, rest = ""] = /^([a-z][a-z0-9+]*):\/\/(.*)$/s.exec(text) ?? [];
  if (scheme === "ssh" || scheme === "raw+ssh") {
    const match = /^(?:([^/]*)@)?(\[[^\]/]+\]|[^:/@]+)(?::(\d+))?(\/.*)$/s.exec(rest);
    if (!match)
      throw new UsageError(`"${text}" is not of the form ${scheme}://[user@]host[:port]/path`);
    const [, user = null, name = "", port = null, path = "/"] = match;
    const clean = withoutSlash(normalize(path));
    // csh cannot quote a newline, and one host's files are read by many shells.
    if (/[\n\r\0]/.test(text))
      throw new UsageError("a path on another host cannot contain a line break");
    const id = `${scheme}://${user === null ? "" : `${user}@`}${name}${port === null ? "" : `:${port}`}${clean}`;
    return {
      kind: scheme === "ssh" ? "folder" : "raw",
      id,
      host: { user, name: name.replace(/^\[|\]$/g, ""), port },
      path: clean,
    };
  }
  if (scheme === "raw") {
    if (!rest.startsWith("/") || rest.includes("\0"))
      throw new UsageError(`"${text}" is not of the form raw:///path`);
    const path = withoutSlash(normalize(rest));
    return { kind: "raw", id: `raw://${path}`, host: null, path };
  }
  const remote = scheme === "rclone" ? rest : /^rclone:(?!\/\/)(.*)$/s.exec(text)?.[1];
  if (remote !== undefined) {
    if (!/^[^-:/\n\r\0][^:/\n\r\0]*:[^\n\r\0]*$|^:[^\n\r\0]+:[^\n\r\0]*$/.test(remote))
      throw new UsageError(`"${text}" is not of the form rclone://REMOTE:PATH`);
    const path = remote.replace(/(?<!:)\/+$/, "");
    return {
      kind: "rclone",
      id: `rclone://${path}`,
      host: null,
      path: /[:/]$/.test(path) ? path : `${path}/`,
    };
  }
  if (scheme)
    throw new UsageError(
      `"${scheme}://" is no kind of location; there are /path, ssh://[user@]host[:port]/path, raw:///path, raw+ssh://[user@]host[:port]/path, rclone://REMOTE:PATH and shell://COMMAND`,
    );
  const [, login, there] = /^([^/:\s]+):([/~].*)$/s.exec(text) ?? [];
  if (login !== undefined)
    throw new UsageError(
      `"${text}" is not a path: write ssh://${login}${there?.startsWith("/") ? there : "/path"}, or ./${text} for a directory here`,
    );
  if (text === "" || text.includes("\0")) throw new UsageError("a path cannot be empty");
  const path = resolve(text);
  return { kind: "folder", id: path, host: null, path };
}

const withoutSlash = (path: string) => (path.length > 1 ? path.replace(/\/+$/, "") || "/" : path);

/** Whether `path` is `folder` or below it. */
const isWithin = (path: string, folder: string) =>
  path === folder || path.startsWith(folder === "/" ? "/" : `${folder}/`);

/** The moment of a `YYYY-MM-DD[ HH:MM[:SS]]`, counted like a snapshot's `time`; what is left out is zero. */
export function parseWhen(text: string): number {
  const [, date = "", time = "00:00", second = "00"] =
    /^(\d{4}-\d\d-\d\d)(?:[ T](\d\d:\d\d)(?::(\d\d))?)?$/.exec(text) ?? [];
  const moment = parseName(`${date.replaceAll("-", "")}-${time.replace(":", "")}${second}`, "");
  if (moment === null)
    throw new UsageError(
      `"${text}" is no time: YYYY-MM-DD, YYYY-MM-DD HH:MM or YYYY-MM-DD HH:MM:SS`,
    );
  return moment;
}

/** A span of ms in words: `3 days`. */
export function inWords(span: number): string {
  const [size, noun] = (
    [
      [365 * DURATION.d, "year"],
      [30 * DURATION.d, "month"],
      [DURATION.d, "day"],
      [DURATION.h, "hour"],
      [60e3, "minute"],
    ] as const
  ).find(([size]) => span >= 2 * size) ?? [1e3, "second"];
  return count(Math.max(0, Math.floor(span / size)), noun);
}

type Dated = { readonly name: string; readonly time: number };

/**
 * Orders entries by the time in their names, but those that have a rank (a place in the source's own order,
 * by subvolume ID) stand in that order among themselves: names repeat when clocks go back.
 */
export function arrange<T extends { readonly moment: number }>(
  entries: readonly T[],
  rank: (entry: T) => number | undefined,
): T[] {
  const byTime = entries
    .map((entry) => ({ entry, rank: rank(entry) }))
    .sort((a, b) => a.entry.moment - b.entry.moment);
  const ranked = byTime
    .filter((one) => one.rank !== undefined)
    .sort((a, b) => (a.rank as number) - (b.rank as number))
    .values();
  return byTime.map(
    (one) => (one.rank === undefined ? one : (ranked.next().value as typeof one)).entry,
  );
}

/**
 * The entries that are ours by name, oldest first. What was taken of the source as it is now is newer
 * than all that came with it when it was restored, and IDs tell its order; those of received
 * snapshots tell when they arrived, but what they were received as a difference to is older.
 */
export function snapshotsAmong(
  entries: readonly Entry[],
  prefix: string,
  source: string | null,
): Snapshot[] {
  const ours = entries.flatMap((entry): Snapshot[] => {
    const time = parseName(entry.name, prefix);
    return time === null ? [] : [{ ...entry, time, moment: entry.moment ?? momentOf(time) }];
  });
  const taken = (entry: Subvolume) => source !== null && entry.parentUuid === source;
  const earlier = behindParents(
    arrange(
      ours.filter((entry) => !taken(entry)),
      ({ id, receivedUuid }) => (receivedUuid === null ? id : undefined),
    ),
  );
  const said = new Set(entries.filter(({ moment }) => moment !== null).map(({ uuid }) => uuid));
  let last = -Infinity;
  return [...earlier, ...ours.filter(taken).sort((a, b) => a.id - b.id)].map((entry) => {
    if (said.has(entry.uuid)) return entry;
    const { moment } = entry;
    last = moment >= last ? moment : momentOf(entry.time, last);
    return moment === last ? entry : { ...entry, moment: last };
  });
}

/** Moves what stands before its parent to behind it: a difference is newer than what it was made against, whatever the names say, unless it is known to be older. */
function behindParents<T extends Entry>(entries: readonly T[]): T[] {
  const standing = byUuid(entries);
  const placed = new Set<T>();
  for (const entry of entries) {
    const line = [entry];
    const older = (one: T) => (one.belated ? undefined : standing.get(one.parentUuid ?? ""));
    for (
      let one = older(entry);
      one !== undefined && !placed.has(one) && !line.includes(one);
      one = older(one)
    )
      line.unshift(one);
    for (const one of line) placed.add(one);
  }
  return [...placed];
}

const count = (n: number, noun: string) => `${n} ${noun}${n === 1 ? "" : "s"}`;

/** What the same data is called wherever it is: streams say this UUID of a snapshot. */
const dataOf = ({ uuid, receivedUuid }: Subvolume) => receivedUuid ?? uuid;

/** How a stream is changed before it is stored or a command gets it; the recipients are gpg's. */
export type Filters = { readonly level: string; readonly recipients: readonly string[] };

/** What the name of a filtered stream ends with. */
const suffixOf = ({ level, recipients }: Filters) =>
  `.btrfs${level === "" ? "" : ".zst"}${recipients.length === 0 ? "" : ".gpg"}`;

/** The longest prefix that leaves a stored stream's name, with all that is put around it, below 255 bytes. */
export const STREAM_PREFIX_BYTES = 70;

/** What the names of streams say of a source; the top level of an old filesystem, and a folder that is copied from, may have no UUID of their own. */
export function ownerOf({ uuid, host, path }: Identity): Owner {
  const isUuid = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(uuid);
  return {
    uuid: isUuid
      ? uuid
      : digestOf(uuid).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12}).*$/, "$1-$2-$3-$4-$5"),
    place: digestOf(`${host}:${path}`).slice(0, 8),
    lineage: digestOf(uuid).slice(0, 8),
  };
}

/** The name of a stored stream, which says all that list and restore must know: NAME+HHMM_PLACE_LINEAGE_SOURCE_UUID_PARENT.btrfs[.zst][.gpg], with + before PARENT if it is belated. */
export function streamName(
  { snapshot, parent, belated }: Transfer,
  owner: Owner,
  filters: Filters,
): string {
  const minutes = Math.round((snapshot.time - snapshot.moment) / 60e3);
  const offset = `${minutes < 0 ? "-" : "+"}${two(Math.floor(Math.abs(minutes) / 60))}${two(Math.abs(minutes) % 60)}`;
  return `${snapshot.name}${offset}_${owner.place}_${owner.lineage}_${owner.uuid}_${dataOf(snapshot)}_${belated ? "+" : ""}${parent === null ? "full" : dataOf(parent)}${suffixOf(filters)}`;
}

const STREAM =
  /^(.*\d{8}-\d{6})([+-])(\d\d)(\d\d)_([0-9a-f]{8})_([0-9a-f]{8})_([0-9a-f-]{36})_([0-9a-f-]{36})_(\+?(?:full|[0-9a-f-]{36}))\.btrfs(\.zst)?(\.gpg)?$/s;
const SUM = ".sha256";

export type StoredFile = { readonly name: string; readonly bytes: number };

/**
 * What a store holds, by its listing alone. `whole`: it cannot hold half a stream, since it renames what is
 * complete, or its user says so; else a stream without a checksum object is incomplete. `debris`: what broken
 * transfers left. One upload at a time leaves one stream at most, on which nothing builds; of more,
 * the checksum objects must have got lost, and they are no debris but `unsummed`.
 */
export function parseStreams(
  files: readonly StoredFile[],
  whole: boolean,
): { streams: Stream[]; debris: Map<string, string[]>; unsummed: Stream[] } {
  const names = new Set(files.map(({ name }) => name));
  const found = files.flatMap(({ name: object, bytes }) => {
    const [
      ,
      text = "",
      sign,
      hours,
      minutes,
      place = "",
      lineage = "",
      source = "",
      uuid = "",
      from = "",
      zst,
      gpg,
    ] = STREAM.exec(object) ?? [];
    const [name, time] = [entryName(text), timeIn(text)];
    if (name === null || time === null || entryName(object) === null) return [];
    const moment = time - (sign === "-" ? -1 : 1) * (Number(hours) * 60 + Number(minutes)) * 60e3;
    const summed = names.has(object + SUM);
    const itself = {
      id: 0,
      path: object,
      name,
      uuid: object,
      receivedUuid: uuid,
      parentUuid: null,
      readonly: false,
    };
    return [
      {
        ...itself,
        moment,
        bytes,
        owner: { uuid: source, place, lineage },
        from: from.endsWith("full") ? null : from.replace("+", ""),
        ...(from.startsWith("+") ? { belated: true as const } : {}),
        compressed: zst !== undefined,
        encrypted: gpg !== undefined,
        summed,
        stored: summed || whole,
      },
    ];
  });
  const stored = found.filter((stream) => stream.stored);
  const children = groupBy(stored, ({ from }) => from);
  // From the full streams up, so that of two streams with the same data the one that needs less stands for both.
  const restorable = new Map<string, Stream>();
  const reached = new Set<string | null>();
  for (
    let next: { stream: Stream; parent: string | null }[] = (children.get(null) ?? []).map(
      (stream) => ({ stream, parent: null }),
    );
    next.length > 0;
  ) {
    for (const { stream, parent } of next)
      restorable.set(stream.uuid, { ...stream, parentUuid: parent, readonly: true });
    const firsts = next.filter(
      ({ stream }) => !reached.has(stream.receivedUuid) && reached.add(stream.receivedUuid),
    );
    next = firsts.flatMap(({ stream }) =>
      (children.get(stream.receivedUuid) ?? []).map((child) => ({
        stream: child,
        parent: stream.uuid,
      })),
    );
  }
  const streams = found
    .map((stream) => restorable.get(stream.uuid) ?? stream)
    .sort((a, b) => a.moment - b.moment);
  const debris = new Map<string, string[]>();
  const add = (name: string, object: string) =>
    debris.set(name, [...(debris.get(name) ?? []), object]);
  for (const { name } of files) {
    const temporary = /^\.(.*?)(?:\.sha256|\.p[0-2]-\d*)?\.part$/s.exec(name)?.[1];
    const orphan =
      name.endsWith(SUM) && !names.has(name.slice(0, -SUM.length))
        ? name.slice(0, -SUM.length)
        : undefined;
    const of = STREAM.exec(temporary ?? orphan ?? "")?.[1];
    if (of !== undefined && prefixOf(of) !== null) add(of, name);
  }
  const unsummed: Stream[] = [];
  for (const some of groupBy(
    streams.filter((stream) => !stream.stored),
    ({ name }) => prefixOf(name),
  ).values()) {
    const [first] = some;
    if (first !== undefined && some.length === 1 && !children.has(first.receivedUuid))
      add(first.name, first.uuid);
    else unsummed.push(...some);
  }
  return { streams, debris, unsummed };
}

/** A backup, and all that it builds on: the full stream first. */
export function chainOf<T extends Subvolume>(backup: T, backups: ReadonlyMap<string, T>): T[] {
  const chain: T[] = [];
  for (
    let one: T | undefined = backup;
    one !== undefined;
    one = one.parentUuid === null ? undefined : backups.get(one.parentUuid)
  )
    chain.unshift(one);
  return chain;
}

function byUuid<T extends Subvolume>(all: readonly T[]): Map<string, T> {
  const found = new Map<string, T>();
  for (const one of all) found.set(one.uuid, one);
  return found;
}

/** The first word that makes of this program the relay, which bytes pass through: see `relay`. */
const RELAY = "--relay";
// Before anything else is loaded, since each stream waits for it, and before any signal has a handler: see `relay`.
if (import.meta.main && process.argv[2] === RELAY)
  relay(JSON.parse(process.argv[3] ?? "{}") as Relay);

const { defineCommand } = await import("citty");
const { createConsola } = await import("consola/basic");
const { $, which } = await import("zx/core");

// ── 2. Hosts ─────────────────────────────────────────────────────────────────────────────

/**
 * Where verbs run: here (`ssh` is null) or through the ssh command given. Every `beat` seconds what holds a lock there is told that we
 * live. `fence`: in which mount namespace.
 */
export type Host = {
  readonly label: string;
  readonly ssh: readonly string[] | null;
  readonly sudo: boolean;
  readonly beat: number;
  readonly fence?: Fence;
};

/**
 * In a mount namespace of its own, a verb works behind the fence (see PRELUDE). `try`: in one where it can be had, for verbs that
 * tell whether it could; `own`: in a new one, or not at all; `pid`: in the one of the process that holds a folder.
 */
export type Fence = "try" | "own" | { readonly pid: string };

/** A constant POSIX script; what it works on comes as positional parameters. */
export type Verb = { readonly name: string; readonly script: string };

/** A line behind which a line break is a blank, since the shell expects more; elsewhere it is a `;`. The last: a pattern of `case` alone. */
const GOES_ON = /[{(|&;]$|(?:^|[\s;])(?:do|then|else|in)$|^[^()]*[^\s()]\)$/;

/** A script as it goes over the wire: one line, without indentation and comments. */
export function oneLine(written: string): string {
  const lines = written
    .split("\n")
    .map((line) => line.trim())
    .filter((line) => line !== "" && !line.startsWith("#"));
  let joined = "";
  let last = "{";
  for (const line of lines) {
    if (joined !== "") joined += GOES_ON.test(last) || line.startsWith(";;") ? " " : "; ";
    joined += line;
    last = line;
  }
  return joined;
}

/** What a line of a script cannot hold: the three characters that login shells differ about (see `quote`), and a comment behind code. */
const UNFIT = /^(?![ \t]*#).*?(?:['\\!]|[ \t;&|(]#)/m;

/**
 * A POSIX shell script, or a piece of one, written over many lines. Nothing but other pieces may be put
 * into it. Errors: what would not survive a login shell, or would hide what follows it in one line.
 */
export function sh(text: TemplateStringsArray, ...pieces: readonly string[]): string {
  // The pieces were looked at when they were made.
  const unfit = text.map((part) => UNFIT.exec(part)?.[0]).find((found) => found !== undefined);
  if (unfit !== undefined) throw new Error(`a shell script cannot hold the end of ${unfit}`);
  return String.raw({ raw: text }, ...pieces);
}

/** The words of "folder fsid names...". */
type Words<S extends string> = S extends `${infer First} ${infer Others}`
  ? First | Words<Others>
  : S;

/**
 * The parameters of a verb by name: `name` must be given; `name?` may be left out, with all that follow; `names...` are
 * any number, and the last.
 */
type Named<S extends string> = {
  readonly [W in Words<S> as W extends `${string}?` | `${string}...` ? never : W]: string;
} & {
  readonly [W in Words<S> as W extends `${infer Name}?` ? Name : never]?: string | undefined;
} & {
  readonly [W in Words<S> as W extends `${infer Name}...` ? Name : never]: readonly string[];
};

/** A verb that was declared: `takes` names its parameters, and `written` is its script as a person reads it. */
export type Declared<S extends string = string> = Verb & {
  readonly takes: S;
  readonly written: string;
};
export type ArgumentsOf<V> = V extends { readonly takes: infer S extends string }
  ? Named<S>
  : never;

/** A verb's parameters, in order; `kind` is what stands behind the name: nothing, `?`, or `...`. */
export const parametersOf = ({ takes }: Pick<Declared, "takes">) =>
  takes.split(" ").map((word) => {
    const [, name = "", kind = ""] = /^(\w+)(\?|\.\.\.)?$/.exec(word) ?? [];
    return { name, kind };
  });

/** A verb's arguments as they go over the wire. */
export function wordsFor<V extends Declared>(verb: V, given: ArgumentsOf<V>): string[] {
  const values = given as Readonly<Record<string, string | readonly string[] | undefined>>;
  const all = parametersOf(verb).map(({ name }) => values[name]);
  const end = all.findLastIndex((value) => value !== undefined);
  return all.slice(0, end + 1).flatMap((value) => value ?? "");
}

/**
 * A word for any login shell. `'`, `\` and `!` stand outside the quotes behind a backslash:
 * fish reads `\'` inside quotes, csh expands `!` there.
 */
export const quote = (word: string) => `'${word.replace(/['\\!]/g, (c) => `'\\${c}'`)}'`;

/** A word of a command that is shown, quoted only if it must be. */
const shellWord = (word: string) => (/^[\w./:@+-]+$/.test(word) ? word : quote(word));

export const LEVELS = { error: 0, warning: 1, info: 3, debug: 4 } as const;

/** Lines at the bottom of a terminal, one for each stream that is under way; whatever else is written goes above them. */
class Terminal {
  readonly #lines = new Map<object, string>();
  #drawn = 0;
  /** Shows a line for a stream, or none any more. */
  show(stream: object, line: string | null): void {
    if (line === null) this.#lines.delete(stream);
    else this.#lines.set(stream, line);
    this.write("");
  }
  write(text: string | Uint8Array): boolean {
    if (this.#drawn > 0) process.stderr.write(`\x1b[${this.#drawn}A\x1b[J`);
    if (text.length > 0) process.stderr.write(text);
    for (const line of this.#lines.values()) process.stderr.write(`${line}\n`);
    this.#drawn = this.#lines.size;
    return true;
  }
}
const terminal = new Terminal();

/** The log: lines for people, on stderr. */
export const log = createConsola({
  level: LEVELS.info,
  reporters: [
    {
      log({ type, args }) {
        const colour =
          !process.stderr.isTTY || process.env["NO_COLOR"]
            ? null
            : ({ error: "31", warn: "33", debug: "2" }[type as string] ?? "36");
        terminal.write(
          `${colour === null ? `[${type}]` : `\x1b[${colour}m[${type}]\x1b[0m`} ${visible(args.join(" "))}\n`,
        );
      },
    },
  ],
});

/** zx as this program uses it: a POSIX shell, words quoted by us, exit statuses looked at by us. */
const shell = $({
  shell: "/bin/sh",
  prefix: "",
  postfix: "",
  quote: (word) => word,
  nothrow: true,
  quiet: true,
});

let privateDirectory: string | null = null;
/** What a run's own directory is called, and in which namespace of processes that run has this number. */
const OWN_DIRECTORY = /^btrfs-backup\.(\d+)\.(\d+)\.\w{6}$/;
/** A directory for control sockets and the like, gone at exit; short, since a socket's path must be. */
function runtimeDirectory(): string {
  if (privateDirectory !== null) return privateDirectory;
  // A root that came from a user's session can still have that user's.
  const own = process.env["XDG_RUNTIME_DIR"];
  const isOwn =
    own !== undefined && lstatSync(own, { throwIfNoEntry: false })?.uid === process.getuid?.();
  const namespace = /\d+/.exec(readlinkSync("/proc/self/ns/pid"))?.[0] ?? "";
  for (const parent of [isOwn ? own : undefined, "/run", tmpdir(), "/tmp"]) {
    if (!parent || parent.length >= 40) continue;
    try {
      clearDead(parent, namespace);
      const made = mkdtempSync(join(parent, `btrfs-backup.${process.pid}.${namespace}.`));
      privateDirectory = made;
      writeFileSync(join(made, "room"), Buffer.alloc(2 ** 16)); // a full one lets directories be made, and nothing be written
      rmSync(join(made, "room"));
      return made;
    } catch {
      // not ours to write to, or full: the next one
      if (privateDirectory !== null) rmSync(privateDirectory, { recursive: true, force: true });
      privateDirectory = null;
    }
  }
  throw new Failure("cannot write to a private directory in /run or /tmp: are they full?");
}

/** Removes what runs that were killed have left. */
function clearDead(parent: string, namespace: string): void {
  for (const name of readdirSync(parent)) {
    const [, pid, other] = OWN_DIRECTORY.exec(name) ?? [];
    const isOurs =
      other === namespace &&
      lstatSync(join(parent, name), { throwIfNoEntry: false })?.uid === process.getuid?.();
    if (isOurs && !existsSync(`/proc/${pid}`))
      rmSync(join(parent, name), { recursive: true, force: true });
  }
}
process.on(
  "exit",
  () => privateDirectory !== null && rmSync(privateDirectory, { recursive: true, force: true }),
);

/** The host of a location; its first command's connection serves all later ones (ControlMaster). */
export function hostOf(
  name: HostName | null,
  options: { sshOptions: readonly string[]; sudo: boolean; sshSudo: boolean },
): Host {
  // Whoever wants ssh to notice a dead link earlier or later wants it of the other side, too.
  const interval = options.sshOptions
    .map((option) => /^ServerAliveInterval[= ]+(\d+)$/i.exec(option)?.[1])
    .find((seconds) => seconds !== undefined);
  const beat = Number(interval ?? 0) || 15;
  if (name === null) return { label: "", ssh: null, sudo: options.sudo, beat };
  // The first value of an ssh option wins: the user's stand before ours.
  const ours = [
    "ControlMaster=auto",
    `ControlPath=${runtimeDirectory()}/%C`,
    "ControlPersist=no",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=2",
    "ConnectTimeout=15",
  ];
  // What a user's configuration lends to hosts that people log in to is not for one that may be hostile.
  ours.push("ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes", "PermitLocalCommand=no");
  // Nor is what it does there instead of what we ask for. An older ssh knows not all of these: ssh_config(5).
  ours.push(
    "IgnoreUnknown=RemoteCommand,ForkAfterAuthentication,SessionType,StdinNull",
    "RemoteCommand=none",
    "ForkAfterAuthentication=no",
    "SessionType=default",
    "StdinNull=no",
  );
  const words = [
    "ssh",
    "-T",
    ...[...options.sshOptions, ...ours].flatMap((option) => ["-o", option]),
  ];
  if (name.port !== null) words.push("-p", name.port);
  if (name.user !== null) words.push("-l", name.user);
  return {
    label: `${name.user === null ? "" : `${name.user}@`}${name.name}`,
    ssh: [...words, "--", name.name],
    sudo: options.sshSudo,
    beat,
  };
}

/** A host, where what runs sees its mounts as everybody does. */
const LOCAL: Host = { label: "", ssh: null, sudo: false, beat: 15 };

const plainHost = ({ fence: _, ...host }: Host): Host => host;

const sameHost = (a: Host, b: Host) => JSON.stringify(a.ssh) === JSON.stringify(b.ssh);

/** What tells a verb's process from others, as in ps(1). */
const titleOf = ({ name }: Verb) => quote(`btrfs-backup:${name}`);

/** The first word that a verb's script gets: "sudo" has btrfs run under it, "fence" says that the mount namespace is its own. */
const modeOf = ({ sudo, fence }: Host) => (sudo ? "sudo" : fence === undefined ? "" : "fence");

/** What a verb's script gets. */
const scriptArguments = (host: Host, args: readonly string[]) =>
  [modeOf(host), ...args].map(quote).join(" ");

const UNSHARE = "unshare -m --propagation slave --";

/** What tells TRY from verbs. */
const TRYING = "btrfs-backup";

/** Runs `sh -c SCRIPT TITLE MODE ARGUMENT...` in a mount namespace of its own where root can have one, with the mode "try". */
const TRY = sh`
  script=$1 title=$2
  shift 2
  seccomp=
  capable=
  while read -r field first second others; do
    case $field in
      Uid:) user=$second;;
      CapEff:) capable=$(((0x$first >> 21) & 1));;
      Seccomp:) seccomp=$first; break;;
    esac
  done </proc/self/status
  # Whoever has CAP_SYS_ADMIN (21) may, unless a filter forbids it, which only a try tells.
  if [ "$user$capable" = 01 ] && { [ "$seccomp" = 0 ] || ${UNSHARE} true 2>/dev/null; }; then
    exec ${UNSHARE} sh -c "$script" "$title" try "$@"
  fi
  exec sh -c "$script" "$title" "" "$@"
`;

/** The words of a command that runs a verb on a host, for its login shell. */
function verbText(host: Host, verb: Verb, args: readonly string[]): string {
  const { sudo, fence } = host;
  if (fence === "try" && !sudo)
    return `sh -c ${quote(oneLine(TRY))} ${quote(TRYING)} ${quote(verb.script)} ${titleOf(verb)} ${args.map(quote).join(" ")}`;
  const text = `sh -c ${quote(verb.script)} ${titleOf(verb)} ${scriptArguments(host, args)}`;
  if (sudo || fence === undefined || fence === "try") return text;
  return fence === "own" ? `${UNSHARE} ${text}` : `nsenter -t ${fence.pid} -m -- ${text}`;
}

/** The shell text that runs a verb on a host. Local and ssh differ nowhere else. */
export function commandFor(host: Host, verb: Verb, args: readonly string[]): string {
  const text = verbText(host, verb, args);
  if (host.ssh === null) return text;
  if (/[\n\r]/.test(text))
    throw new Failure(`${host.label}: a name with a line break cannot be used on another host`);
  return [...host.ssh, text].map(quote).join(" ");
}

/** The shell text that runs a verb on a host with arguments by name, as a stage of a pipeline. */
const commandWith = <V extends Declared>(host: Host, verb: V, given: ArgumentsOf<V>) =>
  commandFor(host, verb, wordsFor(verb, given));

/** Children that end when a signal ends the run; cleaning up must be able to outlive it. */
const running = new Set<() => void>();
let interruption: Interrupted | null = null;
let tellSignalled = () => {};
/** Comes with the first signal that ends the run. */
const signalled = new Promise<true>((come) => (tellSignalled = () => come(true)));
const cleaning = new AsyncLocalStorage<true>(); // one transfer cleans up while others go on

/** Ends everything at the first signal, and gives up cleaning at the second; but not at one that we were started to ignore, as by nohup(1). */
export function stopOnSignals(): void {
  const ignored = BigInt(
    `0x${/^SigIgn:\s*(\w+)/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1] ?? "0"}`,
  ); // a bit each: proc_pid_status(5)
  const isIgnored = (signal: NodeJS.Signals) =>
    ((ignored >> BigInt(osConstants.signals[signal] - 1)) & 1n) === 1n;
  if (isIgnored("SIGCHLD")) process.on("SIGCHLD", () => {}); // else the kernel tells nobody how a child has ended
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const)
    if (signal === "SIGTERM" || !isIgnored(signal))
      process.on(signal, () => {
        if (interruption !== null) process.exit(SIGNAL_STATUS[signal]);
        interruption = new Interrupted(signal);
        for (const stop of running) stop();
        tellSignalled();
      });
}
/** The exit status after a signal; 0 if there was none. */
const statusOfSignal = () =>
  interruption === null ? 0 : (SIGNAL_STATUS[interruption.signal] ?? 1);
const SIGNAL_STATUS: Partial<Record<NodeJS.Signals, number>> = {
  SIGHUP: 129,
  SIGINT: 130,
  SIGTERM: 143,
};

/** Lets nothing in the environment decide whose programs we run, though we enter other users' directories, nor how a shell reads our scripts. */
function settleEnvironment(environment: Record<string, string | undefined>): void {
  const folders = (environment["PATH"] ?? "").split(":").filter((folder) => folder.startsWith("/"));
  environment["PATH"] =
    folders.join(":") || "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
  for (const name of ["SHELLOPTS", "BASHOPTS"]) delete environment[name];
}

function checkInterruption(): void {
  if (interruption !== null && !cleaning.getStore()) throw interruption;
}

/** Runs what must still happen after a signal. */
const whileCleaning = <T>(work: () => Promise<T>): Promise<T> => cleaning.run(true, work);

/** A verb that was started: its output as it comes, its end, and the way to end it. */
type Started = { readonly process: ProcessPromise; readonly stop: () => void };

function start<V extends Declared>(host: Host, verb: V, given: ArgumentsOf<V>): Started {
  const args = wordsFor(verb, given);
  checkInterruption();
  log.debug(
    `${host.label === "" ? "" : `${host.label}: `}${verb.name} ${args.map(shellWord).join(" ")}`,
  );
  const local = host.ssh === null;
  const plain = local && host.fence === undefined;
  // Ctrl-C at a terminal reaches every child there: these are ended by us, after cleaning up. A
  // verb has a process group of its own; ssh stays where it can ask for a passphrase.
  const child = shell({
    stdio: ["pipe", "pipe", "pipe"],
    detached: local,
  })`${`trap "" INT HUP; ${plain ? `: ${titleOf(verb)}; set -- ${scriptArguments(host, args)}; ${verb.script}` : `exec ${commandFor(host, verb, args)}`}`}`;
  const pid = pidOf(child);
  child.stdin.on("error", () => {}); // gone before we were: its exit status tells
  return { process: child, stop: () => sendSignal(local ? -pid : pid, "SIGTERM") };
}

const NO_PROCESS = "no process can be started: see ulimit -n and -u, and the memory that is free";

/** The ID of a process that was started. Errors: Failure where none could be. */
function pidOf(child: ProcessPromise): number {
  if (child.pid === undefined) throw new Failure(NO_PROCESS);
  return child.pid;
}

const WITHOUT_ROOT = `(see "Without root" in the README)`;

/** A verb's exit status other than 0 as an error that says where, what, and what it printed. */
function failureOf(
  host: Host,
  what: string,
  result: { exitCode: number | null; signal: string | null; stdout: string; stderr: string },
): Error {
  const printed = result.stderr.trim() || result.stdout.trim().slice(0, 500); // nologin(8) speaks on stdout
  const denied =
    (host.sudo || (host.ssh === null && process.getuid?.() !== 0)) &&
    /Permission denied|Operation not permitted/.test(printed);
  const said = denied ? `${printed}: this needs root, as sudo gives it ${WITHOUT_ROOT}` : printed;
  // A place stands once in a message, whoever named it.
  const [place] = /^\/.*?(?=: )/.exec(said) ?? [];
  const cause = place !== undefined && what.endsWith(place) ? said.slice(place.length + 2) : said;
  const where = host.label === "" || what.includes(host.label) ? "" : `${host.label}: `;
  const message = `${where}${what}: ${cause || `ended by ${result.signal ?? `exit status ${result.exitCode}`}`}`;
  if (result.exitCode === 64) return new UsageError(said);
  if (result.exitCode === 75) return new Busy(message);
  if (result.exitCode === 76) return new Taken(message);
  if (result.exitCode === 78) return new Unfinished(said);
  if (result.exitCode === 66) return new Absent(message);
  if (result.exitCode === 79) return new Missing(message);
  const unreachable =
    /No route|timed out|Timeout, server|refused|not resolve|unreachable|Host is down|Broken pipe|mux_client|Connection .*(closed|reset)/i;
  return host.ssh !== null && result.exitCode === 255 && unreachable.test(said)
    ? new Unreachable(message)
    : new Failure(message);
}

/** Runs a verb for its output. Errors: Failure, Busy (exit 75), Absent (exit 66, host not reached). */
const ask = async <V extends Declared>(
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  what: string,
  input = "",
): Promise<string> => (await askAll(host, verb, given, what, input)).stdout;

/** Runs a verb for its output in bytes. Errors: those of `ask`. */
const askBytes = async <V extends Declared>(
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  what: string,
): Promise<Buffer> => Buffer.concat((await askAll(host, verb, given, what, "")).chunks);

async function askAll<V extends Declared>(
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  what: string,
  input: string,
): Promise<{ readonly stdout: string; readonly chunks: readonly Buffer[] }> {
  const { process: child, stop } = start(host, verb, given);
  child.stdin.end(input);
  if (!cleaning.getStore()) running.add(stop);
  let bytes = 0;
  const chunks: Buffer[] = [];
  child.stdout.on("data", (chunk: Buffer) => {
    bytes += chunk.length;
    chunks.push(chunk);
  });
  const whose =
    host.ssh === null ? { group: child.pid as number } : { verb, folder: folderOf(given) };
  const worked = async () => `${bytes} ${await workOf(host, whose)}`;
  // What the user's own command waits for is the user's.
  const result = await (verb === HOOK ? child : attended(child, what, worked, stop)).finally(() =>
    running.delete(stop),
  );
  checkInterruption();
  if (result.exitCode !== 0) throw failureOf(host, what, result);
  return { stdout: result.stdout, chunks };
}

// ── what does not end ──

/**
 * In ms: how long a place may be silent that is asked to open; how long what was begun may do nothing (see --timeout), six times as long while
 * it waits for a disk to have everything; and how long what is told to end may take, which on a dead disk it never does.
 */
const LIMITS = { open: 120e3, stuck: 3600e3, parting: 10e3 };

/** Comes with a signal, except for what cleans up after it. */
const interrupting = (): Promise<true> => (cleaning.getStore() ? new Promise(() => {}) : signalled);

/** Waits for so many ms, or until something else is over; tells whether that was over first. */
async function within(ms: number, over: Promise<unknown>): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<false>((done) => (timer = setTimeout(() => done(false), ms)));
  const first = await Promise.race([
    late,
    over.then(
      () => true,
      () => true,
    ),
  ]);
  clearTimeout(timer);
  return first;
}

/**
 * Waits for the end of what runs as long as it does anything: `worked` tells what it has done so far. Then it is stopped; if it does not end by that, as
 * what waits for a dead disk, it is left alone. So it is after a signal. Errors: Stuck, Interrupted.
 */
async function attended<T>(
  ended: Promise<T>,
  what: string,
  worked: () => Promise<string>,
  stop: () => void,
): Promise<T> {
  const pause = Math.min(60e3, LIMITS.stuck / 4); // ms
  let [seen, idle, told] = ["", 0, false];
  const interrupted = interrupting();
  while (!(await Promise.race([within(pause, ended), interrupted]))) {
    const work = await Promise.race([
      worked(),
      ...[ended, interrupted].map((over) =>
        over.then(
          () => "",
          () => "",
        ),
      ),
    ]);
    const isSyncing = work.includes(SYNCING);
    idle = work === seen ? idle + pause : 0;
    seen = work;
    if (isSyncing && idle > 0 && !told)
      log.info(`${what}: waiting for the disk to have everything (${SYNCING})`);
    told ||= isSyncing && idle > 0;
    if (idle < LIMITS.stuck * (isSyncing ? 6 : 1)) continue;
    stop();
    const isOver = await within(LIMITS.parting, ended);
    throw new Stuck(
      `${what}: stuck: for ${idle / 1000} s no byte moved, and none of its processes did anything (--timeout)${isOver ? "" : "; they do not end: does the disk answer?"}`,
    );
  }
  if (interruption !== null && !(await within(LIMITS.parting, ended))) checkInterruption();
  return ended;
}

/** The folder that a verb is asked to work in, if any. */
const folderOf = (given: object) => ("folder" in given ? String(given.folder) : "");

/** What a verb waits in that has a disk write down everything, as WORK tells it. */
const SYNCING = "btrfs filesystem sync";

/** What the processes of a group here, or those of a verb in a folder on another host, have done so far; nothing where nobody can tell. */
async function workOf(
  host: Host,
  {
    group,
    verb,
    folder,
  }: { readonly group?: number; readonly verb?: Verb; readonly folder?: string },
): Promise<string> {
  try {
    const { process: child, stop } = start(plainHost(host), WORK, {
      group: String(group ?? ""),
      verb: verb?.name ?? "",
      folder: folder ?? "",
    });
    child.stdin.end();
    if (await within(30e3, child)) return (await child).stdout;
    stop();
    return "";
  } catch {
    return ""; // a signal
  }
}

/** A verb that holds something (a lock) until it is told to let go. */
type Held = { readonly output: string; readonly release: () => Promise<void> };

/** What is exchanged with a verb on the way: the `first` line that it waits for; that it is `unwanted`, and is ended; and what is done when a line of its output is `seen`. */
type Signals = {
  readonly wait?: number;
  readonly first?: Promise<string> | undefined;
  readonly unwanted?: AbortSignal | undefined;
  readonly seen?: Seen | undefined;
};
type Seen = { readonly line: string; readonly tell: () => void };

/**
 * Starts a verb that prints until a line that is `end`, and then waits for its input to close. It may be silent for `wait` s longer than
 * LIMITS says. Errors: those of `ask`, Unreachable or Stuck where nothing comes.
 */
async function hold<V extends Declared>(
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  end: string,
  what: string,
  { first, unwanted, seen, wait = 0 }: Signals = {},
): Promise<Held> {
  const { process: child, stop } = start(host, verb, given);
  running.add(stop);
  void first?.then((line) => child.stdin.write(`${line}\n`));
  unwanted?.addEventListener("abort", () => running.has(stop) && stop());
  // It waits for the lock of the chain, and then for those of what is still being received there.
  const limit =
    LIMITS.stuck === Infinity ? Infinity : Math.min(LIMITS.open, LIMITS.stuck) + 4000 * wait;
  const interrupted = interrupting()
    .then(() => within(LIMITS.parting, child))
    .then(() => null);
  const output = await Promise.race([
    printed(child, `\n${end}\n`, { limit, from: first, seen }),
    interrupted,
  ]);
  running.delete(stop);
  if (output instanceof Silent) {
    stop();
    const isOver = await within(LIMITS.parting, child);
    const message = `${what}: no answer within ${limit / 1000} s${isOver ? "" : ", and what was asked does not end: does the disk answer?"}`;
    throw host.ssh === null ? new Stuck(message) : new Unreachable(message);
  }
  const beats =
    host.ssh === null ? undefined : setInterval(() => child.stdin.write("."), host.beat * 1000);
  void child.then(() => clearInterval(beats));
  const release = async () => {
    clearInterval(beats);
    child.stdin.end();
    // Over ssh this may be the connection that other commands share, which ends with the last
    // of them: its output ends with the lock, the process when it likes.
    const letGo =
      host.ssh === null
        ? child
        : child.stdout.readableEnded
          ? Promise.resolve()
          : new Promise((done) => child.stdout.once("end", done));
    if (!(await within(LIMITS.parting, letGo))) stop();
  };
  if (output === null) {
    checkInterruption();
    throw failureOf(host, what, await child);
  }
  if (interruption !== null) await release();
  checkInterruption();
  return { output, release };
}

class Silent {}

/** What a verb prints until its output ends so; null if it ends before, Silent if nothing comes for `limit` ms, once `from` is over. Decoded at once: lists of subvolumes can be long. */
function printed(
  child: ProcessPromise,
  end: string,
  {
    limit = Infinity,
    from = Promise.resolve(),
    seen,
  }: {
    readonly limit?: number;
    readonly from?: Promise<unknown> | undefined;
    readonly seen?: Seen | undefined;
  } = {},
): Promise<string | null | Silent> {
  return new Promise((done) => {
    const chunks: Buffer[] = [];
    const [line, last] = [Buffer.from(`\n${seen?.line}\n`), Buffer.from(end)];
    const kept = Math.max(last.length, line.length);
    let tail: Buffer = Buffer.alloc(0);
    let tell = seen?.tell;
    let silence: ReturnType<typeof setTimeout> | undefined;
    let heard = 0;
    let isOver = false;
    const ended = (how: string | null | Silent) => {
      isOver = true;
      clearTimeout(silence);
      done(how);
    };
    // There can be thousands of chunks: none sets a timer.
    const listen = (rest: number) => {
      silence = setTimeout(() => {
        const left = heard + limit - performance.now();
        if (left <= 0) ended(new Silent());
        else listen(left);
      }, rest);
    };
    void from.then(() => {
      heard = performance.now();
      if (!isOver && limit !== Infinity) listen(limit);
    });
    child.stdout.on("data", (chunk: Buffer) => {
      heard = performance.now();
      chunks.push(chunk);
      if (tell !== undefined && Buffer.concat([tail, chunk]).includes(line)) {
        tell();
        tell = undefined;
      }
      tail =
        chunk.length < kept ? Buffer.concat([tail, chunk]).subarray(-kept) : chunk.subarray(-kept);
      if (tail.subarray(-last.length).equals(last)) ended(Buffer.concat(chunks).toString());
    });
    void child.then(() => ended(null));
  });
}

/**
 * One process of a pipeline. `shown`: its stderr goes to the terminal, not into the error; `sends`: what it says does not tell that the receiving side is full; `receives`: it is a `btrfs receive`. `relay`: it is this
 * program, and counts better; `counts` gets what has passed it, and null at the end. `far`: what works for it on another host.
 */
export type Stage = {
  readonly label: string;
  readonly command: string;
  readonly far?: { readonly host: Host; readonly verb: Verb; readonly folder: string };
  readonly shown?: boolean;
  readonly receives?: boolean;
  readonly sends?: boolean;
  readonly relay?: Relay;
  readonly counts?: (bytes: number | null) => void;
};

/** A verb on a host, with arguments by name, as a stage: `what` it does there. */
function staged<V extends Declared>(
  what: string,
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  more: Partial<Stage> = {},
): Stage {
  const far = host.ssh === null ? {} : { far: { host, verb, folder: folderOf(given) } };
  return {
    label: `${what}${host.label === "" ? "" : ` on ${host.label}`}`,
    command: commandWith(host, verb, given),
    ...far,
    ...more,
  };
}

/** Bytes with their SHA-256. */
type Summed = { readonly bytes: number; readonly sum: string };

/** What has passed a pipeline. `bytes`: null where the kernel does not count them; `summed`: what went to its end, if that was asked for. */
type Flown = { readonly bytes: number | null; readonly summed: Summed | null };

/** The relay as a stage. */
const relaying = (relay: Relay, counts?: Stage["counts"]): Stage => ({
  label: "relay",
  command: "",
  relay,
  ...(counts === undefined ? {} : { counts }),
});

/** Of relays side by side, one. */
function withoutTwins(stages: readonly Stage[]): Stage[] {
  return stages.reduce<Stage[]>((all, stage) => {
    const last = all.at(-1);
    const isTwin = stage.relay !== undefined && last?.relay !== undefined;
    return isTwin
      ? [...all.slice(0, -1), { ...last, ...stage, relay: { ...last.relay, ...stage.relay } }]
      : [...all, stage];
  }, []);
}

/** The words that start this program once more. */
const OURSELVES = ((): readonly string[] => {
  const emulated = process.env["BTRFS_BACKUP_RELAY"]; // where the kernel cannot start our own executable: under qemu-user
  if (emulated !== undefined) return emulated.split(" ");
  const file = fileURLToPath(import.meta.url);
  if (file.startsWith("/$bunfs/")) return [process.execPath];
  return [
    process.execPath,
    ...(process.versions["deno"] === undefined ? process.execArgv : ["run", "-A", "--quiet"]),
    file,
  ];
})();

/**
 * What a pipeline has to do with others: it reads from a file, or its last stage feeds process groups, which are killed before it ends badly.
 * `waits`: whether it waits for others just now, and is not to blame for what it does not do.
 */
type Joint = {
  readonly input?: string;
  readonly feeds?: readonly number[];
  readonly waits?: () => boolean;
};

/** A pipeline at work. `blocked`: the outputs of its last relay that take nothing just now, by number. */
type Flowing = {
  readonly group: number;
  readonly kill: () => void;
  readonly blocked: () => readonly number[];
  readonly ended: Promise<Flown>;
};

/**
 * Runs stages as one pipeline in a process group of its own; returns the bytes that the first
 * one wrote, or the first relay passed. If a stage fails, the stages after it
 * are killed before their input closes: the failing one's shell holds the pipe until the group is
 * dead. By SIGKILL: what catches another signal could still take the end of a dying neighbour's
 * output for the end of the stream. Errors: Failure naming the stage that failed first, NoSpace, Stuck, Interrupted.
 */
export const pipeline = async (
  stages: readonly Stage[],
  environment: Record<string, string> = {},
) => flow(stages, environment).ended;

function flow(
  given: readonly Stage[],
  environment: Record<string, string>,
  { input = "/dev/null", feeds = [], waits = () => false }: Joint = {},
): Flowing {
  checkInterruption();
  const stages = withoutTwins(given);
  const directory = mkdtempSync(join(runtimeDirectory(), "p"));
  const file = (name: string | number) => quote(`${directory}/${name}`);
  const texts = stages.map(({ command, shown, relay }, i) => {
    // A child's I/O is added to its parent's when it is waited for: proc(5), /proc/pid/io. A few bytes
    // of the verb's own are in it.
    const measure =
      i === 0
        ? `while read -r k v; do case $k in wchar:) echo "$v" >${file("bytes")};; esac; done </proc/self/io;`
        : "";
    const last = i === stages.length - 1 ? " >&2" : "";
    const end = [...feeds.map((group) => `kill -KILL -${group};`), "kill -KILL 0;"].join(" ");
    const passes =
      relay === undefined
        ? `${command}${last}`
        : `${[...OURSELVES, RELAY, JSON.stringify({ ...relay, tell: `${directory}/told.${i}` })].map(quote).join(" ")}${last}`;
    return `{ { ${passes} 3>&-; } 2>${shown ? "&3" : file(i)}; r=$?; ${measure} echo "${i} $r" >>${file("ended")}; [ $r = 0 ] || { ${end} }; }`;
  });
  log.debug(
    `pipeline: ${stages.map(({ command, relay }) => (relay === undefined ? command : `relay ${JSON.stringify(relay)}`)).join(" | ")}`,
  );
  const child = shell({
    detached: true,
    stdio: ["ignore", "ignore", "pipe"],
    env: { ...process.env, ...environment },
  })`${`exec 3>&2 <${quote(input)}; ${texts.join(" | ")}`}`;
  const group = pidOf(child);
  const said = new TextDecoder();
  child.stderr.on("data", (chunk: Buffer) =>
    terminal.write(visible(said.decode(chunk, { stream: true }))),
  );
  /** What a relay has told: how many bytes have passed, and which outputs take nothing. */
  const toldNow = (i: number) => readIfThere(`${directory}/told.${i}.now`).split(" ").map(Number);
  const counting = stages.flatMap(({ counts }, i) => (counts === undefined ? [] : [{ counts, i }]));
  const tell = () => counting.forEach(({ counts, i }) => counts(toldNow(i)[0] as number));
  const watch = setInterval(tell, 500);
  const kill = () => sendSignal(-group, "SIGKILL");
  running.add(kill);
  let waited = 0;
  const worked = async () => {
    const far = await Promise.all(
      stages.flatMap(({ far }) => (far === undefined ? [] : [workOf(far.host, far)])),
    );
    const passed = stages.flatMap(({ relay }, i) => (relay === undefined ? [] : [toldNow(i)[0]]));
    return [waits() ? ++waited : waited, ...passed, await workOf(LOCAL, { group }), ...far].join(
      "\n",
    );
  };
  const what = stages.map(({ label }) => label).join(" | ");
  const ended = attended(child, what, worked, kill).finally(() => {
    running.delete(kill);
    clearInterval(watch);
    tell();
    for (const { counts } of counting) counts(null);
  });
  return {
    group,
    kill,
    blocked: () => toldNow(stages.length - 1).slice(1),
    ended: ended.then(() => outcome(stages, directory, kill)),
  };
}

/** What `btrfs receive` says where a file that a difference goes on from is not there, or not what it should be; not where the name of the whole is taken. */
const BAD_PARENT =
  /^ERROR: (?!creating |cannot find ).*: (?:No such file or directory|File exists|Not a directory|Invalid argument)$/m;

/** What is in a file; nothing if it is not there. */
function readIfThere(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
}

/** What has become of a pipeline, by the files that its stages left in a directory. */
function outcome(stages: readonly Stage[], directory: string, kill: () => void): Flown {
  const read = (name: string | number) => readIfThere(`${directory}/${name}`).trim();
  const ended = read("ended")
    .split("\n")
    .filter(Boolean)
    .map((line) => line.split(" ").map(Number));
  const errors = stages.map((_, i) => read(i));
  const bytes = read("bytes");
  const passed = stages.flatMap((_, i) =>
    read(`told.${i}`) === "" ? [] : [JSON.parse(read(`told.${i}`)) as Passed],
  );
  rmSync(directory, { recursive: true, force: true });
  checkInterruption();
  if (ended.length < stages.length) kill(); // the shell was killed, and not by a stage
  const [culprit, status] =
    ended.find(([, status]) => status !== 0) ?? (ended.length < stages.length ? [-1, 0] : []);
  if (culprit === undefined) {
    errors.forEach((text, i) => text && log.debug(`${stages[i]?.label}: ${text}`));
    const [first] = passed;
    const last = passed.findLast(({ sum }) => sum !== null);
    const summed = last === undefined ? null : { bytes: last.bytes, sum: last.sum as string };
    return { bytes: first?.bytes ?? (bytes === "" ? null : Number(bytes)), summed };
  }
  const name = stages[culprit]?.label ?? "the shell of the pipeline";
  const how =
    culprit === -1
      ? "was killed"
      : status === 255
        ? "failed: the connection is lost"
        : (status ?? 0) > 128
          ? `was killed by signal ${(status ?? 0) - 128}`
          : `failed with exit status ${status}${status === 75 ? " (an earlier transfer may still be at work)" : ""}`;
  // What the others say is mostly that a pipe broke, but "mostly" is not enough to hide it.
  const said = [culprit, ...errors.keys()]
    .filter((i, at, all) => all.indexOf(i) === at && errors[i])
    .map((i) => (i === culprit ? errors[i] : `(${stages[i]?.label}: ${errors[i]})`));
  const message = `${name} ${how}${said.length > 0 ? `: ${said.join(" ")}` : ""}`;
  const receiving = errors.filter((_, i) => !stages[i]?.sends);
  if (/No space left on device|quota exceeded/i.test(receiving.join("\n")))
    throw new NoSpace(message);
  if (status === 1 && stages[culprit]?.receives && BAD_PARENT.test(errors[culprit] ?? ""))
    throw new BadParent(message);
  throw status === 255
    ? new Unreachable(message)
    : status === 77
      ? new OtherStream(message)
      : culprit === -1 || status === 137
        ? new Killed(message)
        : new Failure(message);
}

/** Signals a process, or a group by its negative number. */
function sendSignal(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {
    // it has ended already
  }
}

// ── 3. Btrfs ─────────────────────────────────────────────────────────────────────────────
// The verbs: constant POSIX scripts that get their values as parameters, what they print, and
// the send stream. A verb is declared once, with the names of its parameters in the order that
// they have on the wire; its script, those who call it, and guard know them by these names.
//
// btrfs alone runs under sudo, never flock, which would run anything. Exit statuses: 64 usage,
// 65 refused, 66 absent, 69 a program is missing, 75 a lock is busy, 76 the name is taken, 77
// another stream. A `folder` comes with the `fsid` that it had when it was opened, and the
// process that holds it locked: hours may have passed, and another disk may be mounted there.

/** What statfs(2) calls btrfs, in hexadecimal: linux/magic.h. */
const BTRFS_MAGIC = "9123683e";

// ── pieces that verbs share ──

/**
 * What every verb begins with. A process costs more than a millisecond: what a shell can do itself, it does.
 * `b` is btrfs; `user_id` sets $user to the effective user's ID; `root` tells whether btrfs runs with root's rights; `line` prints
 * its parameter (echo expands backslashes in dash); `at FOLDER FSID` enters a folder that was opened before, unless another filesystem or directory is there by now,
 * and behind the fence if the verb has a mount namespace of its own. $here is the folder's true path from then on.
 *
 * The fence: whoever can write in a folder can put a link or a device under any name there, at any moment. So root works below a
 * bind of the root of the folder's mount (below a bind of the plain folder, incremental receives fail) on which the kernel follows
 * no links and opens no devices. It is private, so that what is mounted elsewhere stays out; the other mounts are slaves, so that disks that
 * are unmounted meanwhile are free. mount(8) accepts options that it does not know: what is true says mountinfo, proc(5).
 */
const PRELUDE = sh`
  set -e +f
  umask 077
  unset CDPATH GLOBIGNORE TAR_OPTIONS POSIXLY_CORRECT QUOTING_STYLE
  PATH=$PATH:/usr/sbin:/sbin
  LC_ALL=C
  export PATH LC_ALL

  # The first parameter of every verb is its mode: "sudo", "fence", "try" (to have one), or empty.
  mode=$1
  su=
  if [ "$mode" = sudo ]; then
    su=sudo
    b() { sudo -n btrfs "$@"; }
  else
    b() { btrfs "$@"; }
  fi
  shift

  line() { printf %s "$1"; echo; }
  # go DIRECTORY: where it leads. Shells differ in what they say of a failure, and not all tell the cause.
  go() {
    cd -P -- "$1" 2>/dev/null && return
    said=$(LC_ALL=C stat -- "$1/." 2>&1 >/dev/null) || :
    line "\${1%/}: \${said##*: }" >&2
    exit 1
  }

  user_id() {
    while read -r field real user others; do
      if [ "$field" = Uid: ]; then return; fi
    done </proc/self/status
  }
  root() { [ -n "$su" ] || { user_id; [ "$user" = 0 ]; }; }

  # safe OWNER MODE: whether only root and we can change a directory, as stat(1) shows it. A sticky one lets nobody replace what is ours.
  safe() {
    user_id
    case "$1 $2" in
      "0 "d????????[tT]|"$user "d????????[tT]) ;;
      "0 "d????-??-?|"$user "d????-??-?) ;;
      *) return 1;;
    esac
  }
  # ours: whether nobody else can give other subvolumes the names on the way from the root of the mount. btrfs send, delete and show
  # resolve paths themselves (getcwd(3), realpath(3)), and read links, which no mount can forbid.
  ours() {
    left=$PWD
    set --
    while [ -n "$left" ]; do
      case $left in
        /proc/fs|/sys/class) set -- "$left" "$@"; break;;
      esac
      set -- "$left" "$@"
      left=\${left%/*}
    done
    [ . -ef "$PWD" ] || return 1
    # A sticky directory is ours alone for what belongs to us; the top of a snapshot belongs to its owner.
    { stat -c "%u %A" -- "$@" || echo "one of them is gone"; } | while read -r owner permissions; do
      case $permissions in d????????[tT]) return 1;; esac
      safe "$owner" "$permissions" || return 1
    done
  }

  # delete_ids ID...: deletes subvolumes of this filesystem, whatever their names are. It takes a process for each; btrfs wants a subvolume
  # to begin from, as the root of a mount is.
  delete_ids() {
    for id; do
      case $PWD in
        /proc/fs*) b subvolume delete -i "$id" /proc/fs;;
        *) b subvolume delete -i "$id" /sys/class;;
      esac
    done
  }
  # delete_one PATH [any]: deletes the subvolume that is there now, if it is writable, whatever gets its name meanwhile.
  delete_one() {
    if [ "$mode" = fence ]; then
      # In it, all is said of one and the same: in a plain directory, btrfs would tell of the subvolume around it.
      id=$(cd "$1" && [ "$(stat -c %i .)" = 256 ] && { [ "$2" = any ] || [ "$(b property get -ts . ro)" = ro=false ]; } && b inspect-internal rootid .) ||
        { line "$1 is not what was to be deleted" >&2; exit 65; }
      delete_ids "$id"
    else
      b subvolume delete "$1"
    fi
  }

  # into FILE [CONVERSION]: standard input becomes a new file, whatever others put in its place meanwhile: no link, device or FIFO is
  # opened. The dd of busybox cannot do so, and has read nothing then: there the shell refuses what exists, and the fence the rest.
  into() {
    said=$(dd iflag=fullblock bs=1M conv="excl\${2:+,$2}" oflag=nofollow status=none of="$1" 2>&1) && return
    if [ -e "$1" ] || [ -L "$1" ]; then line "$said" >&2; return 1; fi
    (
      set -C
      exec 6>"$1"
      [ -f /proc/self/fd/6 ] || { line "$here/$1 is not a plain file" >&2; exit 65; }
      dd iflag=fullblock bs=1M \${2:+conv="$2"} 2>/dev/null >&6
    )
  }
  # make FILE: an empty one, unless it is there. Another run may be faster.
  make() { [ -f "$1" ] || into "$1" </dev/null 2>/dev/null || [ -f "$1" ]; }

  # opened FILE: opens a plain file as descriptor 6; for writing, too, where that can be, since a FIFO in its place would keep a reader waiting.
  opened() {
    [ -e "$1" ] || [ -L "$1" ] || { line "$here/$1: No such file or directory" >&2; exit 1; }
    if { command exec 6<>"$1"; } 2>/dev/null; then
      :
    elif [ -f "$1" ]; then
      exec 6<"$1"
    else
      line "$here/$1 is not a plain file" >&2; exit 65
    fi
    [ -f /proc/self/fd/6 ] || { line "$here/$1 is not a plain file" >&2; exit 65; }
  }

  # mount_id: sets $mount to the ID of the mount that the current directory is on.
  mount_id() {
    exec 7<.
    while read -r field mount; do
      if [ "$field" = mnt_id: ]; then break; fi
    done </proc/self/fdinfo/7
    exec 7<&-
  }

  # fenced SPOT: whether the bind there is what it must be, and leads to the directory of descriptor 6, which it enters.
  fenced() {
    cd -P -- "$1$below_mount" 2>/dev/null && [ . -ef /proc/self/fd/6 ] || return 1
    mount_id
    needed="nodev nosuid nosymfollow"
    # The sh of busybox does not tell by -w what is mounted read-only.
    if [ "/proc/$$/exe" -ef /bin/busybox ] || [ "/proc/$$/exe" -ef /usr/bin/busybox ]; then
      # shellcheck disable=SC2046 # the fields of a line
      set -- $(grep "^$on " /proc/self/mountinfo)
      case ,$6, in
        *,ro,*) needed="$needed ro";;
      esac
    fi
    case $options in
      *,ro) needed="$needed ro";;
    esac
    # The sixth field has the options, and a private mount has no field between them and the "-".
    # shellcheck disable=SC2046 # the fields of a line
    set -- $(grep "^$mount " /proc/self/mountinfo)
    [ "$7" = - ] || return 1
    for option in $needed; do
      case ,$6, in
        *,$option,*) ;;
        *) return 1;;
      esac
    done
  }

  # fence: goes behind it, in the current directory $here. A directory of proc or sys is bound over: nobody has data there.
  spots=
  fence() {
    exec 6<.
    mount_id
    on=$mount
    # As long as we are at work, the folder's mount is busy for everybody. A directory alone can be entered.
    if cd -P -- "/proc/$PPID/root$here" 2>/dev/null; then exec 5<.; fi
    cd -P -- /proc/self/fd/6
    mount_root=$PWD
    until [ "$PWD" = / ]; do
      cd -P ..
      mount_id
      [ "$mount" = "$on" ] || break
      mount_root=$PWD
    done
    options=nodev,nosuid,nosymfollow
    # What is mounted read-only stays so.
    [ -w "$here" ] || options=$options,ro
    below_mount=\${here#"\${mount_root%/}"}
    for spot in /proc/fs /sys/class; do
      case $spots in *"$spot"*) continue;; esac
      [ -d "$spot" ] || continue
      spots="$spots $spot"
      mount -o "bind,$options" --make-private -- "$mount_root" "$spot" 2>/dev/null && fenced "$spot" && return
      mount --bind -- "$mount_root" "$spot" && mount --make-private "$spot" || return 1
      mount -o "remount,bind,$options" "$spot" && fenced "$spot" && return
      return 1
    done
    return 1
  }
  no_fence="no mount can be had here on which the kernel follows no symbolic links (nosymfollow: Linux 5.10, util-linux 2.38)"

  at() {
    here=$1
    elsewhere="another filesystem or directory is at $1 now"
    # Behind the FSID stands the process that holds the folder locked, and is in it.
    set -- "$1" "\${2%/*}" "/proc/\${2#*/}"
    if [ "$mode" = fence ] && [ /proc/self/ns/mnt -ef "$3/ns/mnt" ]; then
      cd -P -- "$3/cwd"
      [ . -ef "$here" ] || { line "$elsewhere" >&2; exit 66; }
      return
    fi
    cd -P -- "$1" || { echo "(is the disk mounted?)" >&2; exit 66; }
    [ "$PWD" = "$1" ] && { [ . -ef "$3/cwd" ] || [ "$(stat -f -c %i .)" = "$2" ]; } || { line "$elsewhere" >&2; exit 66; }
    if [ "$mode" = fence ]; then fence || { line "$here: $no_fence" >&2; exit 1; }; fi
  }`;

const declared: Declared[] = [];
/** Every verb that there is. */
export const VERBS: readonly Declared[] = declared;

/** Declares a verb. Its script finds the parameters under their names, and those of `names...` as "$@". */
function verb<const S extends string>(
  name: string,
  takes: S,
  script: string,
  prelude = PRELUDE,
): Declared<S> {
  const parameters = parametersOf({ takes });
  const one = parameters.filter(({ kind }) => kind !== "...");
  const named = one
    .map(({ name }, i) => `${name}=${i < 9 ? `$${i + 1}` : `\${${i + 1}}`}`)
    .join(" ");
  const shifted = one.length < parameters.length ? `shift ${one.length}` : "";
  const written = `${prelude}\n${named}\n${shifted}\n${script}`;
  let joined: string | null = null; // most verbs of a run are never sent
  const made = {
    name,
    takes,
    written,
    get script() {
      return (joined ??= oneLine(written));
    },
  };
  declared.push(made);
  return made;
}

/**
 * enter PATH: a directory by its path as it was given, behind the fence where that can be had ($fenced says so). Else $strange is
 * the first directory on the way that others than root and we can change. A symbolic link is followed as long as none was met:
 * whoever can change what is above it decides where it leads.
 */
const ENTER = sh`
  # walk PATH: as the kernel does, from the root. Sets $walked to where it leads, and $strange.
  walk() {
    left=$1
    walked=
    strange=
    links=0
    while [ -n "$left" ]; do
      left=\${left#/}
      component=\${left%%/*}
      left=\${left#"$component"}
      case $component in
        ""|.) continue;;
        ..) walked=\${walked%/*}; continue;;
      esac
      # shellcheck disable=SC2046 # an owner and a mode
      set -- $(stat -c "%u %A" -- "$walked/$component")
      case $2 in
        l*)
          case "$1/$strange" in
            0/|"$user/") ;;
            *) line "$walked/$component is a symbolic link that others can change: name the place itself" >&2; exit 65;;
          esac
          links=$((links + 1))
          [ $links -le 40 ] || exit 65
          leads=$(readlink -- "$walked/$component")
          case $leads in /*) walked=;; esac
          left=/$leads$left
          ;;
        *)
          walked=$walked/$component
          safe "$1" "$2" || strange=\${strange:-$walked}
          ;;
      esac
    done
    walked=\${walked:-/}
  }

  # follow PATH: makes sure that walking it leads here.
  follow() {
    there=\${here:-$PWD}
    user_id
    walk "$1"
    [ "$walked" = "$there" ] || { line "$1 leads to $walked now" >&2; exit 66; }
  }

  here=
  fenced=
  strange=
  enter() {
    go "$1"
    here=$PWD
    case $mode in
      try) if fence 2>/dev/null; then fenced=yes; else cd -P -- "$here"; fi;;
      fence) fence || { line "$here: $no_fence" >&2; exit 1; }; fenced=yes;;
    esac
    if [ -n "$fenced" ] && [ "$here" = "$1" ]; then return; fi
    follow "$1"
    if [ -n "$fenced" ]; then strange=; fi
  }`;

/** keep SECONDS: until the input closes, or is silent for so long: a dead link tells the other side nothing. */
const KEEP = sh`
  keep() {
    if [ -n "$1" ] && command -v timeout >/dev/null; then
      while [ -n "$(timeout "$1" dd bs=1 count=1 2>/dev/null 8<&- 9<&-)" ]; do :; done
    else
      exec cat >/dev/null
    fi
  }`;

/** For `keep`: how many seconds a host waits for our next beat. */
const silence = (host: Host) => (host.ssh === null ? "" : String(4 * host.beat));

/** watch PID: ends this process group when that process, which holds our lock over the same link, is gone. */
const WATCH = sh`
  watch() {
    if [ -n "$1" ]; then
      (
        printf %s backup-waiting >/proc/self/comm
        while [ -d "/proc/$$" ]; do [ -d "/proc/$1" ] || kill -KILL 0; sleep 2; done
      ) >/dev/null 2>&1 </dev/null &
    fi
  }`;

/**
 * What processes have done so far, a line each: those of `group`, or of the groups in which `verb` works in `folder`. It tells of no process
 * that only waits, or passes on what others make: what waits for a holder's end, ssh, which talks also of nothing. See proc(5): stat, io.
 */
const WORK = verb(
  "work",
  "group verb folder",
  sh`
  groups=" $group "
  if [ -n "$verb" ]; then
    # shellcheck disable=SC2013 # there are no blanks in them
    for found in $(grep -lszxF -e "btrfs-backup:$verb" /proc/[0-9]*/cmdline); do
      grep -qszxF -e "$folder" "$found" || continue
      read -r line 2>/dev/null <"\${found%cmdline}stat" || continue
      # shellcheck disable=SC2086 # words
      set -- \${line##*) }
      groups="$groups$3 "
    done
  fi
  for found in /proc/[0-9]*/stat; do
    read -r line 2>/dev/null <"$found" || continue
    command=\${line#*(}
    # shellcheck disable=SC2086 # words
    set -- \${line##*) }
    case $groups in *" $3 "*) ;; *) continue;; esac
    case $command in "ssh)"* | "sleep)"* | "backup-waiting)"*) continue;; esac
    found=\${found%/stat}
    if grep -qszxF -e --relay "$found/cmdline"; then set -- 0; fi
    line "\${found#/proc/} \${12} \${13}"
    grep -s "^[rw]char:" "$found/io" || :
    case $command in "btrfs)"*) ;; *) continue;; esac
    if grep -qszxF -e filesystem "$found/cmdline" && grep -qszxF -e sync "$found/cmdline"; then echo "${SYNCING}"; fi
  done
`,
);

/**
 * record HEADER KEY VALUE [BEGINNING]: replaces one line of the record in the current directory, whole or not at all; with a
 * BEGINNING, only that is taken out of the line as it is by now. Written by dd, which says what went wrong, and syncs it;
 * dash knows only "I/O error".
 */
const RECORD = sh`
  record() { (
    first=$1 start=$2 own=$2$3 ending=$4
    [ -n "$first" ] && [ -n "$start" ] || { echo "no line of a record" >&2; exit 65; }
    flock -w 60 7 || { line "another run keeps $here locked" >&2; exit 75; }
    file=.btrfs-backup.json
    new=$file.new
    set --
    if [ -e $file ]; then
      opened $file
      while IFS= read -r old; do
        case $old in
          "$start$ending"*) [ -z "$ending" ] || own="$start{\${old#"$start$ending"}";;
          "$start"*) own=$old;;
          ,*) set -- "$@" "$old";;
        esac
      done <&6
    fi
    if [ -e $new ] || [ -L $new ]; then rm -f $new; fi
    for text in "$first" "$@" "$own" "}"; do line "$text"; done | into $new fsync
    mv -T -f $new $file
  ) 7<.; }`;

/** receiving PREFIX SECONDS: this process alone writes to the chain from here on. Opened for reading: a disk may be mounted so. */
const RECEIVING = sh`
  receiving() {
    make ".btrfs-backup.$1.receiving" || :
    opened ".btrfs-backup.$1.receiving"
    exec 8<&6 6<&-
    flock -w "$2" 8 || { line "an earlier transfer is still being received in $here" >&2; exit 75; }
  }`;

/** sha256: prints the SHA-256 of standard input as sha256sum does, which takes three times as long as openssl (coreutils 9.1). */
const SUMMING = sh`
  sha256() {
    if command -v openssl >/dev/null; then openssl dgst -sha256 -r | sed "s/ .*/  -/"; else sha256sum; fi
  }`;

/** own_file FILE: whether nobody but root and we have written it. `is_complete FILE SUM BYTES KEPT`: whether a file has so many bytes, and those behind the KEPT ones have that SHA-256. */
const COMPLETE = sh`
  ${SUMMING}
  own_file() {
    # shellcheck disable=SC2046 # an owner and a mode
    safe $(stat -L -c "%u d%A" "$1" | sed "s/ d./ d/") || { line "$here/\${part#./} belongs to others, or they can change it" >&2; exit 65; }
  }
  is_complete() {
    found=$(stat -L -c %s "$1")
    [ "$found" = "$3" ] || { echo "only $found of $3 bytes arrived" >&2; exit 1; }
    [ -z "$4" ] || [ "$(tail -c "+$(($4 + 1))" "$1" | sha256)" = "$2  -" ] ||
      { echo "other bytes arrived than were sent" >&2; exit 1; }
  }`;

// ── places: looking at them, making them, and what is remembered there ──

/**
 * Prints all that there is to know of a folder (and of the SOURCE whose snapshot folder it is), in sections that begin with a
 * NONCE no listing can contain: see parseInspection. `kind` is `streams` for a folder of stored streams, and `known` where the
 * protocol need not be asked for. `wait` is `look`, or the seconds to wait for the lock, which is then held until the input
 * closes; or `later`: one of these comes as a line of input.
 */
const OPEN = verb(
  "open",
  "nonce wait folder prefix source kind silence",
  sh`
  ${KEEP}
  ${ENTER}
  say() { echo; line "$nonce $1"; }

  [ "$kind" = streams ] || command -v btrfs >/dev/null || { echo "btrfs not found: install btrfs-progs" >&2; exit 69; }
  need_flock() {
    case $(flock -V 2>/dev/null) in
      *util-linux*) ;;
      *) echo "flock not found: install util-linux" >&2; exit 69;;
    esac
  }

  # SOURCE, if there is one: from here on by its real path.
  unfinished() {
    for file in "$source".restoring-*/.btrfs-backup.finishing; do
      if [ -f "$file" ]; then line "a restore was interrupted, and is not finished: $file" >&2; exit 78; fi
    done
  }
  if [ -n "$source" ]; then
    [ -d "$source" ] || { unfinished; line "no such directory: $source" >&2; exit 64; }
    go "$source"
    [ "$PWD" = "$source" ] || follow "$source"
    source=$PWD
    [ "$wait" = look ] || unfinished
    say source; line "$source"
  fi

  say host; read -r host </proc/sys/kernel/hostname; echo "$host"
  say zstd; command -v zstd || :
  # Enter the folder, or the one above where it is not there. "$@" are our own files in it, which must be plain ones.
  set --
  exists=
  if [ -d "$folder" ]; then
    exists=folder
    enter "$folder"
    say folder; line "$here"
    [ -r . ] || { line "$here: Permission denied" >&2; exit 1; }
    foul() { line "$here/$1 is not a plain file" >&2; exit 65; }
    for file in ".btrfs-backup.$prefix.lock" ".btrfs-backup.$prefix.receiving" .btrfs-backup.json .outstanding_transfers; do
      if [ -L "$file" ]; then foul "$file"
      elif [ -f "$file" ]; then set -- "$@" "$file"
      elif [ -e "$file" ]; then foul "$file"
      fi
    done
  elif [ -e "$folder" ] || [ -L "$folder" ]; then
    line "not a directory: $folder" >&2; exit 65
  elif [ -d "\${folder%/*}/" ]; then
    enter "\${folder%/*}/"
    say missing; line "$here"
  else
    line "no such directory: \${folder%/*} (is the disk mounted?)" >&2; exit 79
  fi
  # Behind the first step into the folder, which may be what mounts it. The inode of a filesystem there is a new one with each mount.
  say boot; read -r boot </proc/sys/kernel/random/boot_id; line "$boot"
  say filesystems; stat -c "%i %n" /sys/fs/btrfs/*-* 2>/dev/null || :
  say fence; line "$fenced"
  say strange; line "$strange"

  # One process for all that is of the same kind. Of files only the owner counts.
  say user; user_id; line "$user"
  say inodes; stat -c "%i %u %A" \${source:+"$source"} . "$@"
  places=$(stat -f -c "%i %t %a %S %b" \${source:+"$source"} .)
  say places; echo "$places"
  # shellcheck disable=SC2086 # five words a line, and those of SOURCE come first
  set -- $places
  [ $# = 5 ] || shift 5
  btrfs=
  if [ "$kind" = streams ]; then :; elif [ "$2" = ${BTRFS_MAGIC} ]; then btrfs=btrfs; fi

  # Whatever can change while others have the lock comes after this. The other .receiving locks are those of commands,
  # and of remotes of rclone. A folder without a lock file is not locked: nothing is written before it is known to be ours.
  if [ "$wait" = later ]; then
    wait=$(dd bs=16 count=1 2>/dev/null)
    [ "$wait" = look ] || { [ "$wait" -ge 0 ] 2>/dev/null && [ \${#wait} -le 6 ]; } || { line "not a number of seconds: $wait" >&2; exit 65; }
  fi
  if [ "$wait" = look ]; then
    :
  elif [ -n "$exists" ] && [ -f ".btrfs-backup.$prefix.lock" ]; then
    opened ".btrfs-backup.$prefix.lock"
    exec 9<&6 6<&-
    flock -w "$wait" 9 || { need_flock; line "another run holds $here/.btrfs-backup.$prefix.lock" >&2; exit 75; }
    ${RECEIVING}
    for file in ".btrfs-backup.$prefix.receiving" ".btrfs-backup.$prefix".????????.receiving; do
      if [ -f "$file" ]; then
        file=\${file#.btrfs-backup.}
        receiving "\${file%.receiving}" "$wait"
        exec 8<&-
      fi
    done
    say locked; echo $$
  else
    need_flock
  fi

  record=
  if [ -n "$exists" ] && [ -e .btrfs-backup.json ]; then
    opened .btrfs-backup.json
    record=/proc/self/fd/6
  fi
  say mounts
  { echo; echo "$nonce record"; } | cat /proc/self/mountinfo - $record

  if [ -n "$exists" ]; then
    set -- .* *
    # IFS is a line break.
    IFS=$(echo; echo x)
    IFS=\${IFS%x}
    say entries; printf %s "$*"; echo
    unset IFS
    say old
    # Once this program has written its own, only if 0.3.1 has been back.
    if [ -f .btrfs-backup.json ] && [ .btrfs-backup.json -nt .outstanding_transfers ]; then
      :
    elif [ -f .outstanding_transfers ]; then
      opened .outstanding_transfers
      cat <&6
    fi
  fi
  if [ "$kind" = streams ]; then
    say files
    [ -z "$exists" ] || find . -mindepth 1 -maxdepth 1 -type f -exec stat -c "%s/%Y %n" {} +
  fi

  if [ -z "$btrfs" ]; then
    :
  elif root; then
    say subvolumes; b subvolume list -a -c -u -q -R .
    say readonly; b subvolume list -a -r .
  else
    # Whoever is not root gets no list, and can only ask of each.
    say roots
    for file in \${source:+"$source"} .; do b inspect-internal rootid "$file" || echo 0; done
    say alone
    for file in "./$prefix"[0-9]*-[0-9]*; do
      if [ "$(stat -c %i "$file" 2>/dev/null)" = 256 ]; then
        line "$(b inspect-internal rootid "$file") $(b property get -ts "$file" ro) $file"
      fi
    done
  fi

  version=/sys/fs/btrfs/features/send_stream_version
  say stream
  if [ -z "$kind" ] && [ -f $version ]; then read -r version <$version; echo "$version"; btrfs --version; fi
  echo; echo "$nonce end"
  [ "$wait" = look ] || keep "$silence"
`,
);

/** Makes the folder (its last component only) and the chain's lock file; another first run may be faster. */
const CREATE = verb(
  "create",
  "folder fsid prefix",
  sh`
  above=\${folder%/*}
  if [ -d "$folder" ]; then
    :
  else
    at "\${above:-/}" "$fsid"
    mkdir "./\${folder##*/}" || [ -d "./\${folder##*/}" ]
  fi
  at "$folder" "$fsid"
  make ".btrfs-backup.$prefix.lock"
`,
);

/**
 * Makes what is missing of the directories above `folder`, and prints the first, where that cannot be a disk that is not mounted: what is there
 * lies on a btrfs that is neither that of `source`, a path on the same host, nor the root filesystem. `how`: "look" makes nothing. Else it exits with 66.
 */
const PARENTS = verb(
  "parents",
  "folder source how",
  sh`
  ${ENTER}
  filesystem_of() { findmnt -n -o MAJ:MIN -T "$1"; }
  missing=\${folder%/*}
  above=\${missing%/*}
  rest=\${missing##*/}
  until [ -d "$above/" ]; do
    rest=\${above##*/}/$rest
    above=\${above%/*}
  done
  refused() { line "no such directory: $missing (is the disk mounted? $1; if it is to be made: mkdir -p $missing)" >&2; exit 66; }
  [ "$(stat -f -c %t "\${above:-/}")" = ${BTRFS_MAGIC} ] || refused "\${above:-/} is not on btrfs"
  on=$(filesystem_of "\${above:-/}")
  [ -n "$on" ] || refused "it cannot be told on which filesystem \${above:-/} is"
  if [ "$on" = "$(filesystem_of /)" ]; then refused "\${above:-/} is on the root filesystem"; fi
  if [ -n "$source" ] && [ "$on" = "$(filesystem_of "$source")" ]; then refused "\${above:-/} is on the filesystem of SOURCE"; fi
  enter "\${above:-/}"
  if [ -z "$fenced" ] && [ -n "$strange" ]; then refused "others can change $strange"; fi
  line "$above/\${rest%%/*}"
  if [ "$how" = look ]; then exit 0; fi
  mkdir -p "./$rest"
`,
);

/** Replaces one line of the record: see RECORD. `sync`: when everything else is on the disk. */
const WRITE_RECORD = verb(
  "record",
  "folder fsid header key value sync?",
  sh`
  ${RECORD}
  at "$folder" "$fsid"
  [ "$sync" = "" ] || b filesystem sync . >&2
  record "$header" "$key" "$value"
  [ "$sync" = "" ] || sync .
`,
);

/** Standard input becomes a file that everybody may read. Nobody reads half of it, and after a power cut it has one of both contents. */
const METRICS = verb(
  "metrics",
  "file",
  sh`
  temporary=
  gone() { [ -z "$temporary" ] || rm -f "$temporary"; }
  trap gone EXIT
  temporary=$(mktemp "\${file%/*}/.\${file##*/}.XXXXXX")
  cat >"$temporary"
  sync "$temporary" 2>/dev/null || sync
  chmod 644 "$temporary"
  mv -T -f -- "$temporary" "$file"
  temporary=
`,
);

/** Moves a record out of the way. */
const ASIDE = verb(
  "aside",
  "folder fsid suffix",
  sh`
  at "$folder" "$fsid"
  mv -T -f .btrfs-backup.json ".btrfs-backup.json.$suffix"
`,
);

/** Prints what the list of subvolumes does not tell of the top level. */
const SHOW = verb(
  "show",
  "folder fsid",
  sh`
  at "$folder" "$fsid"
  b subvolume show .
`,
);

// ── snapshots, and the way that they go ──

/** Gives a snapshot another name, in the same folder. */
const RENAME = verb(
  "rename",
  "folder fsid name to",
  sh`
  at "$folder" "$fsid"
  if [ -e "./$to" ] || [ -L "./$to" ]; then line "$here/$to is there" >&2; exit 76; fi
  mv -T "./$name" "./$to"
`,
);

/** The user's own command, before or after a snapshot. What it leaves running must not keep us waiting for our pipes. */
const HOOK = verb(
  "hook",
  "command",
  sh`
  output=$(mktemp) || output=
  sh -c "$command" >"\${output:-/dev/null}" 2>&1 </dev/null && result=0 || result=$?
  if [ -n "$output" ]; then cat "$output" >&2; rm -f "$output"; fi
  [ "$result" = 0 ] || { echo "(exit status $result)" >&2; exit 1; }
`,
  "shift",
); // the user's own environment

/** Takes the snapshot `name`. Prints `subvolume show` of it, or only the ID for whoever is not root. The kernel commits the transaction. */
const SNAPSHOT = verb(
  "snapshot",
  "source folder fsid name",
  sh`
  at "$folder" "$fsid"
  snapshot=$PWD/$name
  if [ -e "$snapshot" ] || [ -L "$snapshot" ]; then exit 76; fi
  cd -P -- "$source"
  [ "$PWD" = "$source" ] || { line "$source leads to $PWD now" >&2; exit 66; }
  b subvolume snapshot -r . "$snapshot" >/dev/null
  if [ "$mode" = fence ]; then
    # Whatever has its name by now, it is shown by its ID.
    id=$(cd "$snapshot" && b inspect-internal rootid .)
    case $snapshot in
      /proc/fs*) b subvolume show -b -r "$id" /proc/fs;;
      *) b subvolume show -b -r "$id" /sys/class;;
    esac
  elif root; then
    b subvolume show -b "$snapshot"
  else
    id=$(b inspect-internal rootid "$snapshot")
    echo " UUID: id:$id"
    echo " Subvolume ID: $id"
  fi
`,
);

/**
 * The stream of `snapshot`, on standard output; in full if `parent` is empty, compressed unless `level` is, as long as `holder`
 * lives. Cut short it still ends well for zstd, but never for `btrfs receive`. Of `skip` bytes (a multiple of 64 KiB) that are
 * kept over there with the SHA-256 `sum`, only what follows is sent, if these are the same. Where others can change names, `uuid`
 * and `clone` (in hexadecimal) are what the stream must say of itself and of its parent.
 */
const SEND = verb(
  "send",
  "flag folder fsid level protocol holder snapshot parent skip sum uuid? clone?",
  sh`
  ${SUMMING}
  ${WATCH}
  watch "$holder"
  at "$folder" "$fsid"
  case $protocol in
    2) protocol="--proto 2 --compressed-data";;
    1) protocol="--proto 1";;
  esac
  # made SNAPSHOT PARENT
  # shellcheck disable=SC2086 # the protocol is several words
  made() {
    if [ -n "$parent" ]; then
      b send "$flag" $protocol -p "$2" "$1"
    else
      b send "$flag" $protocol "$1"
    fi
  }
  # The directory that we are in is the same, whatever its name becomes.
  made_within() {
    cd "./$snapshot" || return 1
    made . "../$parent"
  }
  # The first command of a stream (linux/fs/btrfs/send.h) says its UUID, and that of its parent.
  as_asked() {
    length=$((51 + \${#snapshot}))
    difference=
    if [ -n "$parent" ]; then
      length=$((length + 32))
      difference="02000800????????????????14001000$clone"
    fi
    beginning=$(dd bs=$length count=1 iflag=fullblock 2>/dev/null | base64 -w 0)
    case $(echo "$beginning" | base64 -d | od -A n -v -t x1 | tr -d "[:space:]") in
      *01001000$uuid$difference) ;;
      *) line "$here/$snapshot is another subvolume now, or its parent is" >&2; return 1;;
    esac
    echo "$beginning" | base64 -d
    cat
  }
  stream() {
    if [ -z "$uuid" ] || ours; then
      made "./$snapshot" "./$parent"
    else
      { sent=$( { { made_within && echo ok >&5; } | as_asked >&6; } 5>&1 ) && [ "$sent" = ok ]; } 6>&1
    fi
  }
  pack() { if [ -n "$level" ]; then zstd -q -c -T2 "-$level"; else cat; fi; }
  rest() {
    kept=$(dd bs=65536 count=$((skip / 65536)) iflag=fullblock 2>/dev/null | sha256)
    if [ "$kept" = "$sum  -" ]; then cat; else echo other >&3; fi
  }
  # What sudo runs is not ours to kill: it ends with the pipe that it writes to.
  if [ -z "$level$su$skip" ]; then
    stream
  else
    exec 4>&1
    told=$( { { stream && echo ok >&3; } | if [ -n "$skip" ]; then pack | rest; else pack; fi >&4; } 3>&1 )
    case $told in
      ok) ;;
      *other*) echo "it is another stream than before" >&2; exit 77;;
      *) exit 1;;
    esac
  fi
`,
);

/** Of each snapshot, a line with the first 512 bytes of its stream, in hexadecimal: see changedIn. No file is read for them. */
const HEADS = verb(
  "heads",
  "folder fsid snapshots...",
  sh`
  at "$folder" "$fsid"
  for name; do
    head=$(b send -q --no-data "$name" | dd bs=512 count=1 iflag=fullblock 2>/dev/null | od -A n -v -t x1 | tr -d "[:space:]")
    [ -n "$head" ] || exit 1
    echo "$head"
  done
`,
);

/** Of each snapshot, the generation of its top directory, as lsattr(1) tells it. Nothing where there is no lsattr. */
const BIRTHS = verb(
  "births",
  "folder fsid snapshots...",
  sh`
  at "$folder" "$fsid"
  command -v lsattr >/dev/null || exit 0
  lsattr -v -d "$@" || :
`,
);

/**
 * What a stream consists of: how often each command is in it, and how often data of each length (` len=N`), which
 * are not read for it.
 */
const ESTIMATE = verb(
  "estimate",
  "folder fsid snapshot parent",
  sh`
  at "$folder" "$fsid"
  stream() {
    if [ -n "$parent" ]; then
      b send -q --no-data -p "./$parent" "./$snapshot"
    else
      b send -q --no-data "./$snapshot"
    fi
  }
  stream | btrfs receive --dump | grep -o -e "^[a-z_]*" -e " len=[0-9]*$" | sort | uniq -c
`,
);

/** How much is read of a difference without its data at most, in bytes: some 100,000 commands. */
const REWRITTEN_MOST = "32000000";

/** A difference without the data of its files; of a large one, the beginning. */
const REWRITTEN = verb(
  "rewritten",
  "folder fsid snapshot parent",
  sh`
  at "$folder" "$fsid"
  b send -q --no-data -p "./$parent" "./$snapshot" | head -c ${REWRITTEN_MOST}
`,
);

/** Of each path in a snapshot, its size there, and that of the same file in a parent, or -; nothing where there is no such path. */
const FILE_SIZES = verb(
  "filesizes",
  "folder fsid snapshot parent paths...",
  sh`
  at "$folder" "$fsid"
  # elsewhere INODE PARENT: number and size of the file that has another path there, or -.
  elsewhere() {
    if found=$(b inspect-internal inode-resolve "$1" "./$2" 2>&1); then
      stat -c "%i %s" -- "$(line "$found" | head -n 1)" | grep "^$1 "
    else
      case $found in
        *"No such file"*) echo -;;
        *) return 1;;
      esac
    fi
  }
  for path; do
    here=$(stat -c "%i %s" -- "./$snapshot$path" 2>/dev/null) || here=
    there=
    # Where links are followed, the path could lead elsewhere.
    if [ "$mode" = fence ]; then there=$(stat -c "%i %s" -- "./$parent$path" 2>/dev/null) || there=; fi
    inode=\${here% *}
    if [ -n "$here" ]; then
      case $there in
        "$inode "*) ;;
        *) there=$(elsewhere "$inode" "$parent") || here=;;
      esac
    fi
    echo "\${here#* }\${here:+ }\${here:+\${there#* }}"
  done
`,
);

/**
 * Takes the stream, see `send`. The record says `beginning` and `rest` meanwhile, and { and `rest` afterwards: the announcement
 * comes, and goes when all is on the disk; with a `sync` of `next`, the next transfer's replaces it. Unless `part` is empty, the stream is that file, if it is complete; with a `flag` of guard's (one that
 * ends in C) it comes from there all the same.
 */
const RECEIVE = verb(
  "receive",
  "flag folder fsid level holder prefix header key beginning rest part? sum? bytes? kept? sync?",
  sh`
  ${RECORD}
  ${RECEIVING}
  ${WATCH}
  ${COMPLETE}
  watch "$holder"
  at "$folder" "$fsid"
  receiving "$prefix" 0
  if [ -n "$part" ]; then
    # Whoever can change names there could put another stream in its place: it is opened once, and must be ours.
    opened "./.$part.part"
    own_file /proc/self/fd/6
    is_complete /proc/self/fd/6 "$sum" "$bytes" "$kept"
    case $flag in
      *C) ;;
      *) exec </proc/self/fd/6;;
    esac
  fi
  if [ -n "$header" ]; then record "$header" "$key" "$beginning$rest"; fi

  unpack() { if [ -n "$level" ]; then zstd -q -d -c; else cat; fi; }
  # Without the fence, in a destination's folder, where the parents are: a chroot keeps a stream from what is above it.
  chroot=-C
  if [ "$mode" = fence ] || [ -z "$header" ]; then chroot=; fi
  # shellcheck disable=SC2086 # an option, or none
  take() {
    if [ -z "$level$su" ]; then
      b receive "$flag" $chroot . >&2
    else
      told=$( { { unpack && echo ok >&3; } | b receive "$flag" $chroot . >&2; } 3>&1 ) && [ "$told" = ok ]
    fi
  }
  # What is unmounted under its feet, btrfs receive calls a file that is not there; behind the fence, it goes on unseen.
  result=0
  take || result=1
  at "$folder" "$fsid"
  [ $result = 0 ] || exit 1
  # Its data are in memory until now: as long as they are, the announcement stays. A restore syncs at its end.
  [ "$sync" = later ] || b filesystem sync . >&2
  # What the next transfer writes will replace it.
  if [ "$sync" = next ]; then exit 0; fi
  if [ -n "$header" ]; then
    record "$header" "$key" "{$rest" "$beginning"
    # The new name of the record, too: else the announcement could come back.
    sync .
  fi
`,
);

/**
 * What a broken transfer left of the stream `object` to go on from: its file `.OBJECT.pPROTOCOL-LEVEL.part`, how many bytes
 * of it count, and their SHA-256. Where others can write, they could put a link in its place.
 */
const KEPT = verb(
  "kept",
  "folder fsid prefix object",
  sh`
  ${SUMMING}
  ${RECEIVING}
  at "$folder" "$fsid"
  receiving "$prefix" 10
  # shellcheck disable=SC2046 # an owner and a mode
  safe $(stat -c "%u %A" .) || exit 0
  for file in "./.$object.p"*.part; do
    if [ -f "$file" ] && [ -z "$(find "$file" -prune -type l)" ]; then
      size=$(($(stat -c %s "$file") / 65536 * 65536))
      line "$size $(head -c "$size" "$file" | sha256) $file"
    fi
  done
`,
);

/** Removes all that was kept to go on from. */
const TIDY = verb(
  "tidy",
  "folder fsid prefix",
  sh`
  ${RECEIVING}
  at "$folder" "$fsid"
  receiving "$prefix" 10
  digits="[0-9][0-9][0-9][0-9]"
  for file in ./.*.part; do
    case $file in
      "./.$prefix"$digits$digits-$digits*_*_*_*_*_*.btrfs*.p[0-2]-*.part) rm -f "$file";;
    esac
  done
`,
);

/**
 * Removes what a broken transfer left, and its announcement; unless it is read-only (an orphaned receive completed it after
 * all), but for `how` of `whole`: it is in doubt whether its data are on the disk.
 */
const DISCARD = verb(
  "discard",
  "folder fsid prefix name header key value how?",
  sh`
  ${RECORD}
  ${RECEIVING}
  at "$folder" "$fsid"
  receiving "$prefix" 10
  if [ -e "./$name" ] && { [ "$how" = whole ] || [ "$(b property get -ts "./$name" ro)" = ro=false ]; }; then
    delete_one "./$name" "\${how:+any}" >&2
    b filesystem sync .
  fi
  if [ -n "$value" ]; then record "$header" "$key" "$value"; fi
`,
);

/**
 * those IDS TOP ./NAME...: whether these subvolumes, in a folder whose path from the top level is TOP, still have these IDs: names may
 * have become others since they were decided on. A process for each, or, of many, the list for all.
 */
const THOSE = sh`
  those() {
    left=$1 above=\${2#/}
    shift 2
    # Paths are told from the top level, which has no name.
    above=\${above:+$above/}
    # What has just been received into a directory that nobody else can enter.
    [ -n "$left" ] || return 0
    changed="the subvolumes are others than those that were to be deleted"
    if [ $# -gt 3 ] && root; then
      for one; do
        shift
        set -- "$@" -e "ID \${left%% *} $above\${one#./}"
        left=\${left#* }
      done
      found=$(b subvolume list -a . | sed -e "s, gen [0-9]* top level [0-9]* path <FS_TREE>/, ," -e t -e "s, gen [0-9]* top level [0-9]* path , ," | grep -c -x -F "$@") || :
      [ "$found" = $(($# / 2)) ] || { line "$changed" >&2; exit 65; }
    else
      for one; do
        [ -d "$one" ] && [ "$(b inspect-internal rootid "$one")" = "\${left%% *}" ] || { line "$changed: $one" >&2; exit 65; }
        left=\${left#* }
      done
    fi
  }`;

/**
 * Deletes many at once, as ./NAME, if they still have their IDs. What cannot be deleted is as before, and the cause is told where it is an
 * attribute, which a snapshot has from its source. The cleaner sleeps for up to 30 s unless a sync wakes it.
 */
const DELETE = verb(
  "delete",
  "convert sync folder fsid top ids names...",
  sh`
  ${THOSE}
  not_ours() { if ours; then return 1; fi; }
  stays() {
    for name; do
      [ -d "$name" ] || continue
      if [ "$convert" = rw ]; then b property set -f -ts "$name" ro true || :; fi
      case $(lsattr -d "$name" 2>/dev/null) in
        ????i*|?????a*) line "$here/\${name#./} has the attribute i or a (lsattr -d), as its source had: btrfs property set -f NAME ro false, chattr -ia NAME, and delete it" >&2;;
      esac
    done
    exit 1
  }
  at "$folder" "$fsid"
  for name; do
    if [ -L "$name" ]; then echo "a symbolic link has the name of a subvolume" >&2; exit 65; fi
  done
  if [ -n "$ids" ] && [ "$mode" = fence ] && { [ $# -le 3 ] || not_ours; }; then
    # Their IDs are all that others cannot change; for a few, it takes no more processes.
    # shellcheck disable=SC2086 # several words
    delete_ids $ids >/dev/null || stays "$@"
  else
    those "$ids" "$top" "$@"
    if [ "$convert" = rw ]; then
      for name; do b property set -f -ts "$name" ro false || :; done
    fi
    b subvolume delete "$@" >/dev/null || stays "$@"
  fi
  if [ "$sync" = sync ]; then
    b filesystem sync .
    b subvolume sync . >/dev/null
  fi
`,
);

// ── restoring ──

/** Makes the directory `work` that a restore works in, marks it as ours, and holds it locked; see CLEAR. */
const RESTORING = verb(
  "restoring",
  "folder fsid work end silence",
  sh`
  ${KEEP}
  at "$folder" "$fsid"
  before=\${work%.restoring-*}.before-\${work##*.restoring-}
  for name in "$work" "$before"; do
    if [ -e "./$name" ] || [ -L "./$name" ]; then line "$here/$name is there" >&2; exit 76; fi
  done
  mkdir "./$work" || { if [ -d "./$work" ]; then exit 76; fi; exit 1; }
  cd "./$work"
  exec 9<.
  flock -n 9
  into .btrfs-backup.restoring </dev/null
  echo $$
  line "$end"
  keep "$silence"
`,
);

/** behind PATH: sets $behind to the name of an absolute path behind the fence, where it is below the same mount. */
const BEHIND = sh`
  behind() {
    behind=$1
    if [ "$mode" = fence ]; then
      case $1/ in
        "\${mount_root%/}"/*) behind=$spot\${1#"\${mount_root%/}"};;
        *) line "$1 is not below $mount_root, as $here is" >&2; exit 65;;
      esac
    fi
  }`;

/** Removes what an interrupted restore left: the subvolumes ./PATH, in the order of their IDs, and the directory `work`. */
const CLEAR = verb(
  "clear",
  "folder fsid work ids paths...",
  sh`
  at "$folder" "$fsid"
  if [ -d "./$work" ] && [ -z "$(find "./$work" -prune -type l)" ]; then :; else exit 0; fi
  [ -f "./$work/.btrfs-backup.finishing" ] && exit 0
  [ -f "./$work/.btrfs-backup.restoring" ] ||
    { rmdir "./$work" 2>/dev/null || line "$here/$work is not from a restore, and stays" >&2; exit 0; }
  (
    cd -P -- "./$work"
    exec 9<.
    flock -n 9 || { line "another restore is at work in $here/$work" >&2; exit 75; }
    for file in .btrfs-backup.*.receiving; do
      if [ -f "$file" ]; then
        opened "$file"
        exec 8<&6 6<&-
        flock -w 10 8 || { line "what an interrupted restore began is still being received in $here/$work" >&2; exit 75; }
      fi
    done
    # shellcheck disable=SC2086 # several words
    if [ "$mode" = fence ]; then
      delete_ids $ids >/dev/null
    elif [ $# -gt 0 ]; then
      b subvolume delete "$@" >/dev/null
    fi
    rm -f .btrfs-backup.*
    cd ..
    rmdir "./$work"
  )
`,
);

/**
 * Makes WORK/tree, a writable snapshot of `origin` (empty: of WORK/NAME, which was received), and in `target`, a folder of it
 * unless absolute, the snapshot `name`: `how` is `keep`: with the origin's received UUID; `plain`: without one; or `none`. The
 * tree is a user's, who may have put a symbolic link there. Stubs of snapshots that were nested in the source go (inode 2,
 * which is rmdir's).
 */
const BUILD = verb(
  "build",
  "folder fsid work origin target name how",
  sh`
  ${BEHIND}
  at "$folder" "$fsid"
  cd -P -- "./$work"
  work=$PWD
  if [ -n "$origin" ]; then behind "$origin"; origin=$behind; else origin=$work/$name; fi
  b subvolume snapshot "$origin" "$work/tree" >/dev/null
  enter() { cd -P -- "$1" && [ "$PWD" = "$1" ] || { line "\${1#"$work/tree/"} is not a plain folder in this backup" >&2; exit 65; }; }
  case $target in
    /*)
      behind "$target"
      cd -P -- "$behind"
      ;;
    *)
      find "$work/tree" -mindepth 1 -maxdepth 1 -inum 2 -exec rmdir {} +
      target=$work/tree/$target
      enter "\${target%/*}"
      if [ -d "$target" ] && [ "$(stat -c %i "$target")" = 2 ]; then rmdir "$target"; fi
      [ -d "$target" ] || mkdir "$target" 2>/dev/null || :
      enter "$target"
      find . -mindepth 1 -maxdepth 1 -inum 2 -exec rmdir {} +
      ;;
  esac
  case $how in
    none) ;;
    *) if [ -e "./$name" ] || [ -L "./$name" ]; then exit 76; fi;;
  esac
  case $how in
    keep)
      b subvolume snapshot -r "$origin" "$PWD/$name" >/dev/null
      ;;
    plain)
      b subvolume snapshot "$origin" "$PWD/$name" >/dev/null
      b property set -ts "$PWD/$name" ro true
      ;;
  esac
  if [ "$origin" = "$work/$name" ]; then delete_one "$origin" any >/dev/null; fi
`,
);

/**
 * Gives a tree in `work` the name of TARGET, what has that now its own with the time of the restore, and moves snapshots from one folder
 * to another. What is to be done comes as lines of input: these folders, `old` or `new`, HOW and NAME in turn (`move`, or `copy` for what was received,
 * which would lose its received UUID), and `end`. It stands in a file until it is done, so that it can be gone on with, `how` being empty,
 * wherever it was interrupted. Prints where the snapshots
 * are to be, the names of those that cannot move, each with a slash behind it, and `end`; nothing if there is nothing to be finished.
 */
const FINISH = verb(
  "finish",
  "folder fsid work how",
  sh`
  ${BEHIND}
  ${COMPLETE}
  at "$folder" "$fsid"
  list=./$work/.btrfs-backup.finishing
  if [ "$how" = begin ]; then
    (
      cd "./$work"
      into .btrfs-backup.told
      [ "$(tail -n 1 .btrfs-backup.told)" = end ]
      mv -T .btrfs-backup.told .btrfs-backup.finishing
    )
    # What is restored is on the disk before anything else loses its name.
    b filesystem sync . >/dev/null
  elif [ -f "$list" ] && [ -z "$(find "$list" -prune -type l)" ]; then
    :
  else
    exit 0
  fi
  opened "$list"
  part=$list
  own_file /proc/self/fd/6
  exec 9<&6 6<&-
  flock -w 10 9 || { line "another restore is at work in $here/$work" >&2; exit 75; }

  IFS= read -r from <&9
  IFS= read -r to <&9
  read -r kind <&9
  set --
  while read -r one <&9; do
    if [ "$one" = end ]; then break; fi
    IFS= read -r name <&9
    set -- "$@" "$one" "$name"
  done
  [ "$one" = end ]
  told=$to
  behind "$from"
  from=$behind
  behind "$to"
  to=$behind
  target=\${work%.restoring-*}
  before=
  if [ "$kind" = old ]; then before=$target.before-\${work##*.restoring-}; fi

  # each COMMAND HOW NAME...
  each() {
    command=$1
    shift
    while [ $# -gt 0 ]; do
      "$command" "$1" "$2" || return
      shift 2
    done
  }
  stands() { [ -e "./$1" ] || [ -L "./$1" ]; }
  free() { if stands "$1"; then line "$here/$1 exists" >&2; return 76; fi; }
  # give_up STATUS: as if it had not begun.
  give_up() {
    if [ "$how$unsettled" = begin ]; then rm -f "$list"; fi
    exit "$1"
  }
  # alive COMMAND...: what was killed has not failed: it is to be gone on with.
  alive() {
    "$@" && return
    [ $? -lt 128 ] || { echo "it was killed" >&2; exit 1; }
    return 1
  }
  # Whether all can move is known before the first name changes: what is being sent cannot be made writable.
  unsettled=
  try() {
    if [ "$1" = copy ]; then return; fi
    if alive b property set -ts "$from/$2" ro false && alive b property set -ts "$from/$2" ro true; then return; fi
    b property set -ts "$from/$2" ro true || unsettled=yes
    return 1
  }
  if [ "$how" = begin ]; then
    each try "$@" || give_up 1
  elif stands "$work/tree" && { [ -z "$before" ] || { stands "$target" && free "$before" 2>/dev/null; }; }; then
    # No name has changed yet: it is as if it had not begun, but that one of them can be writable.
    # shellcheck disable=SC2317 # it is called by each
    put_back() { [ "$1" = copy ] || b property set -ts "$from/$2" ro true; }
    each put_back "$@"
    rm -f "$list"
    exit 0
  fi
  if stands "$work/tree"; then
    if [ -n "$before" ] && stands "$target"; then
      free "$before" || give_up 76
      alive mv -T -- "./$target" "./$before" || give_up 1
    fi
    free "$target" || give_up 76
    alive mv -T -- "./$work/tree" "./$target" || {
      [ -z "$before" ] || mv -T -- "./$before" "./$target"
      give_up 1
    }
  fi
  case $from/ in
    "$PWD/$target"/*) [ -z "$before" ] || from=$PWD/$before\${from#"$PWD/$target"};;
  esac

  # shown FIELD PATH
  shown() { b subvolume show "$2" | sed -n "s/^[[:space:]]*$1:[[:space:]]*//p"; }
  duplicate() {
    if [ -e "$to/$1" ] || [ -L "$to/$1" ]; then
      [ "$(shown "Parent UUID" "$to/$1")" = "$(shown UUID "$from/$1")" ]
    else
      b subvolume snapshot -r "$from/$1" "$to/$1" >&2
    fi
  }
  # carry HOW NAME: moves one, however far that had come, and prints its name if it cannot.
  carry() {
    if [ "$1 $(cd "$from/$2" 2>/dev/null && echo there)" = "copy there" ]; then
      alive duplicate "$2" && alive delete_one "$from/$2" any >&2
    elif [ -d "$from/$2" ]; then
      if alive b property set -ts "$from/$2" ro false; then
        if alive mv -T -- "$from/$2" "$to/$2"; then
          alive b property set -ts "$to/$2" ro true
        else
          b property set -ts "$from/$2" ro true
          false
        fi
      else
        false
      fi
    else
      [ "$1" = copy ] || alive b property set -ts "$to/$2" ro true
    fi || stuck=$stuck$2/
  }
  # Nothing is printed until it is done: who asked for it can be gone, and writing to nobody would end it.
  stuck=
  each carry "$@"
  b filesystem sync . >/dev/null
  rm -f "./$work"/.btrfs-backup.*
  rmdir "./$work" || :
  line "$told"
  line "$stuck"
  echo end
`,
);

// ── looking into trees ──

/**
 * What every digest and listing of a tree is made of: its paths but for the top and for stubs of nested
 * subvolumes (inode 2), which are not sent. The top's own mtime is not carried by incremental streams.
 */
const PATHS = sh`
  paths() {
    { find . -mindepth 1 "(" -inum 2 -prune -o "$@" -print0 ")" || echo failed >&3; } | { sort -z || echo failed >&3; }
  }`;

const ATTRIBUTES = `--numeric-owner --xattrs --xattrs-include="*"`;

/**
 * SHA-256 of a tree with all that a stream carries. GNU tar gives the same bytes for the same tree in POSIX format
 * without atime, ctime and its process ID, but leaves sockets out. ACLs come as the attributes that they are: with
 * --acls, tar would write the names that users have on this host.
 */
const DIGEST = verb(
  "digest",
  "folder fsid snapshot",
  sh`
  ${PATHS}
  ${SUMMING}
  at "$folder" "$fsid"
  cd -P -- "./$snapshot"
  tar --version 2>/dev/null | grep -q "GNU tar" || { echo "GNU tar not found: install tar" >&2; exit 69; }
  command -v sha256sum >/dev/null || { echo "sha256sum not found: install coreutils" >&2; exit 69; }
  pack() {
    tar --create --format=posix --pax-option="exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime" ${ATTRIBUTES} --no-recursion --warning=no-file-ignored "$@" ||
      echo failed >&3
  }
  sockets() { paths -type s | xargs -0 -r stat --printf "%n %a %u:%g %.9Y/" || echo failed >&3; }
  exec 4>&1
  bad=$( { { pack --mtime=@0 .; sockets; paths | pack --null --verbatim-files-from -T -; } | sha256 >&4; } 3>&1 )
  [ -z "$bad" ]
`,
);

/**
 * What differs is found in: `stat --printf FORMAT` of every path, the SHA-256 of every file, and where getfattr is installed
 * all extended attributes, each part ended by an empty word; in base64, since names are bytes and not always text.
 */
const LISTING = verb(
  "listing",
  "folder fsid snapshot format",
  sh`
  ${PATHS}
  at "$folder" "$fsid"
  cd -P -- "./$snapshot"
  list() {
    stat --printf "$format" .
    paths | xargs -0 -r stat --printf "$format"
    head -c 1 /dev/zero
    paths -type f | xargs -0 -r sha256sum -z
    head -c 1 /dev/zero
    if command -v getfattr >/dev/null; then
      getfattr -h -d -m - -e hex .
      paths | xargs -0 -r getfattr -h -d -m - -e hex
    else
      echo missing
    fi
    echo whole >&3
  }
  exec 4>&1
  told=$( { list | base64 -w 0 >&4; } 3>&1 )
  [ "$told" = whole ]
`,
);

/** When each subvolume was made that has a parent, in UTC: as that is of all that was received as a difference. One process, whatever their number. */
const MADE = verb(
  "made",
  "folder fsid",
  sh`
  at "$folder" "$fsid"
  TZ=UTC0
  export TZ
  b subvolume list -a -s -u .
`,
);

/** Of each ./NAME a line with the name, and one with the creation time. */
/**
 * When directories were made, in s since 1970, as far as the kernel tells: of a subvolume that is not a snapshot, when it was made itself. (A
 * snapshot has its directory from what it was taken of.)
 */
const BORN = verb(
  "born",
  "folder fsid names...",
  sh`
  at "$folder" "$fsid"
  stat -c "%W %n" -- "$@"
`,
);

const RECEIVED = verb(
  "received",
  "folder fsid names...",
  sh`
  at "$folder" "$fsid"
  for name; do
    line "$name"
    b subvolume show "$name" | grep "Creation time:"
  done
`,
);

/** Bytes referenced by each ./NAME, as `btrfs filesystem du -s --raw` tells. */
const SIZES = verb(
  "sizes",
  "folder fsid names...",
  sh`
  at "$folder" "$fsid"
  b filesystem sync . >/dev/null
  b filesystem du -s --raw "$@"
`,
);

/** The subvolume that `file` is, or was, in, and the path in it. Of its path only the last component is taken as it is. */
const LOCATE = verb(
  "locate",
  "file",
  sh`
  ${ENTER}
  above=\${file%/*}
  rest=/\${file##*/}
  until [ -d "$above/" ]; do
    rest=/\${above##*/}$rest
    above=\${above%/*}
  done
  go "$above/"
  here=$PWD
  [ "$PWD" = "\${above:-/}" ] || follow "$above/"
  above=\${PWD%/}
  until [ "$(stat -c %i .)" = 256 ] || [ "$PWD" = / ]; do cd ..; done
  printf %s "$PWD"
  head -c 1 /dev/zero
  top=\${PWD%/}
  printf %s "\${above#"$top"}$rest"
`,
);

/**
 * Of `inner`, a path, in every subvolume that has it: what `realpath` makes of the directory above it, as NUL-terminated words after
 * "open" and that of the folder itself, since a symbolic link may lead out of a snapshot (only "fenced", where the kernel follows none); an empty one; and `stat --printf FORMAT`. `word` is printf's format of a word.
 */
const VERSIONS = verb(
  "versions",
  "folder fsid format word inner names...",
  sh`
  at "$folder" "$fsid"
  stat --printf x . >/dev/null || { echo "GNU stat not found: install coreutils" >&2; exit 69; }
  # paths INNER NAME...
  paths() {
    within=$1
    shift
    # shellcheck disable=SC2059 # a format that this program gives
    for name; do printf "$word" "$name$within"; done
  }
  # Behind the fence the kernel follows no link.
  if [ "$mode" = fence ]; then
    paths "" fenced
  else
    paths "" open
    { paths "" .; paths "\${inner%/*}" "$@"; } | xargs -0 realpath -q -z -e -- || :
  fi
  paths "" ""
  {
    { paths "$inner" "$@" | xargs -0 stat --printf "$format" -- 2>&1 >&3 || :; } | {
      if grep -v -e ": No such file or directory" -e ": Not a directory" -e ": Too many levels of symbolic links" >&2; then
        exit 1
      fi
    }
  } 3>&1
`,
);

/** origin: enters the directory that `inner` is in, in a snapshot. Its parameters are those of TAKE. */
const ORIGIN = sh`
  origin() {
    at "$folder" "$fsid"
    cd "./$snapshot"
    [ "$(stat -c %i .)" = 256 ] && [ "$(b property get -ts . ro)" = ro=true ] || { line "$here/$snapshot is no snapshot" >&2; exit 65; }
    top=$PWD
    cd -P -- "./\${inner%/*}"
    [ "$PWD" = "$top\${inner%/*}" ] || { line "$here/$snapshot$inner is reached through a symbolic link" >&2; exit 65; }
  }`;

/** A file or directory out of a subvolume, as a tar archive. */
const TAKE = verb(
  "take",
  "folder fsid snapshot inner",
  sh`
  ${ORIGIN}
  origin
  tar --create --format=posix --sparse ${ATTRIBUTES} -- "./\${inner##*/}"
`,
);

/**
 * DIRECTORY/NAME becomes what is called `base` in the archive on standard input, or `inner` of a subvolume here; whole or not
 * at all, and over another file only with `force`.
 */
const PUT = verb(
  "put",
  "directory name force base folder? fsid? snapshot? inner?",
  sh`
  ${ENTER}
  ${ORIGIN}
  [ -d "$directory" ] || { line "no such directory: $directory (--to names another place)" >&2; exit 65; }
  enter "$directory"
  if [ -z "$fenced" ] && [ -n "$strange" ] && [ "$user" = 0 ]; then
    line "others can change $strange, and $no_fence: --to names a place of root alone" >&2
    exit 65
  fi
  directory=$here
  # The other folder is entered behind a fence of its own.
  if [ -n "$fenced" ]; then mode=fence; fi
  if [ -d "./$name" ] && [ -z "$(find "./$name" -prune -type l)" ]; then
    line "$directory/$name is a directory: --to names what is to be made" >&2; exit 65
  fi
  if [ -e "./$name" ] || [ -L "./$name" ]; then
    if [ -z "$force" ]; then line "$directory/$name exists: --force replaces it" >&2; exit 65; fi
  fi
  temporary=
  gone() { [ -z "$temporary" ] || rm -rf "$temporary"; }
  trap gone EXIT
  temporary=$(mktemp -d "$PWD/.btrfs-backup.XXXXXX")
  if [ -n "$folder" ]; then
    ( origin; cp -a --reflink=auto -- "./$base" "$temporary/$base" )
  else
    tar --extract --preserve-permissions --same-owner ${ATTRIBUTES} -C "$temporary" -f -
  fi
  mv -T -- "$temporary/$base" "./$name"
  # What is said to be back is on the disk.
  sync -f . 2>/dev/null || sync
`,
);

// ── stored streams ──

/** Takes a stream. `size`: of a part for S3; for a file, how much of it is kept. */
type PutVerb = Declared<"folder fsid lock object holder size">;
/** Makes a stream complete, with its checksum object beside it; never if another stream has the UUID. */
type CommitVerb = Declared<"folder fsid lock object sum bytes part? kept? uuid?">;
/** Prints objects, or the checksum of one if `how` is `sum`. */
type GetVerb = Declared<"folder fsid how holder objects...">;
/** Deletes objects in the order given, a checksum object only after its stream; with one process, if no stream of these checksum objects is there. */
type DropVerb = Declared<"folder fsid lock objects...">;
/**
 * Where streams are stored: `list` (which is `open` for a folder), and these. `lock`, which those hold that write, is the
 * prefix of a chain in a folder, and a file for a remote.
 */
type StoreVerbs = {
  readonly put: PutVerb;
  readonly commit: CommitVerb;
  readonly get: GetVerb;
  readonly delete: DropVerb;
};

/** sumfile OBJECT SUM BYTES: the text of a checksum object. */
const SUM_FILE = sh`
  sumfile() { printf %s "$2  $1"; echo; echo "# $3 bytes"; }`;

/** What both kinds of `get` do with a function `get OBJECT`. */
const GET = sh`
  ${SUMMING}
  if [ "$how" = sum ]; then
    exec 4>&1
    for object; do
      told=$( { { get "$object" && echo ok >&3; } | sha256 >&4; } 3>&1 )
      [ "$told" = ok ]
    done
  else
    every "$@"
  fi`;

/** A file has a temporary name until it is complete, and on the disk. Others may be able to write there: no link that they plant is followed. */
const RAW: StoreVerbs = {
  put: verb(
    "store",
    "folder fsid lock object holder size",
    sh`
    ${COMPLETE}
    ${RECEIVING}
    ${WATCH}
    watch "$holder"
    at "$folder" "$fsid"
    receiving "$lock" 0
    part=./.$object.part
    if [ "\${size:-0}" = 0 ]; then
      rm -f "$part"
      into "$part"
    else
      opened "$part"
      own_file /proc/self/fd/6
      [ "$(stat -L -c %s /proc/self/fd/6)" -ge "$size" ]
      truncate -s "$size" /proc/self/fd/6
      cat >>/proc/self/fd/6
    fi
  `,
  ),
  commit: verb(
    "commit",
    "folder fsid lock object sum bytes part? kept? uuid?",
    sh`
    ${RECEIVING}
    ${SUM_FILE}
    ${COMPLETE}
    at "$folder" "$fsid"
    receiving "$lock" 10
    part=./.\${part:-$object}.part
    checksum=./.$object${SUM}.part
    if [ -n "$uuid" ]; then
      for file in ./*_"$uuid"_*; do
        if [ -e "$file" ]; then line "$file is there" >&2; exit 76; fi
      done
    fi
    opened "$part"
    own_file /proc/self/fd/6
    is_complete /proc/self/fd/6 "$sum" "$bytes" "$kept"
    [ "\${kept:-0}" = 0 ] || sum=$(sha256 </proc/self/fd/6)
    rm -f "$checksum"
    sumfile "$object" "\${sum%% *}" "$bytes" | into "$checksum"
    sync "$part" "$checksum"
    mv -T "$checksum" "./$object${SUM}"
    mv -T "$part" "./$object"
    [ "./$object" -ef /proc/self/fd/6 ] || { line "$here/$object is another file now" >&2; exit 65; }
    sync .
  `,
  ),
  get: verb(
    "fetch",
    "folder fsid how holder objects...",
    sh`
    ${WATCH}
    watch "$holder"
    at "$folder" "$fsid"
    get() { opened "./$1"; cat <&6; }
    every() {
      # Behind the fence the kernel follows no link.
      plain=$mode
      for object; do [ -f "./$object" ] || plain=; done
      if [ "$plain" = fence ]; then
        cat -- "$@"
      else
        for object; do get "$object"; done
      fi
    }
    ${GET}
  `,
  ),
  delete: verb(
    "drop",
    "folder fsid lock objects...",
    sh`
    ${RECEIVING}
    at "$folder" "$fsid"
    receiving "$lock" 10
    below() { case $1 in *${SUM}) [ -e "./\${1%${SUM}}" ];; *) false;; esac; }
    together=yes
    for object; do
      if below "$object"; then together=; fi
    done
    if [ -n "$together" ]; then
      rm -f -- "$@"
    else
      for object; do
        if below "$object"; then continue; fi
        rm -f "./$object"
      done
    fi
    sync .
  `,
  ),
};

/** locked FILE SECONDS: this process alone writes to the remote from here on. */
const LOCKED = sh`
  locked() {
    make "$1" || :
    opened "$1"
    exec 8<&6 6<&-
    flock -w "$2" 8 || { echo "an earlier transfer is still at work" >&2; exit 75; }
  }`;

/**
 * Filters, and what changes how names are listed or bytes are printed, would hide from us what is stored (rclone(1), its options as variables);
 * and whoever does not see a stream stores it again, over the old one.
 */
const HIDING = [
  ...["", "METADATA_"].flatMap((of) =>
    ["FILTER", "INCLUDE", "EXCLUDE"].flatMap((how) => [`${of}${how}`, `${of}${how}_FROM`]),
  ),
  ..."HASH_FILTER EXCLUDE_IF_PRESENT FILES_FROM FILES_FROM_RAW MAX_AGE MIN_AGE MAX_SIZE MIN_SIZE MAX_DEPTH IGNORE_CASE".split(
    " ",
  ),
  ..."DRY_RUN INTERACTIVE FORMAT SEPARATOR CSV ABSOLUTE RECURSIVE DIRS_ONLY OFFSET COUNT HEAD TAIL DISCARD".split(
    " ",
  ),
];
const ALL_OBJECTS = sh`
  unset ${HIDING.map((name) => `RCLONE_${name}`).join(" ")}`;

/** Objects of a remote cannot be renamed everywhere: without a checksum object, one is not complete. */
const RCLONE: StoreVerbs & { readonly list: Declared<"folder"> } = {
  list: verb(
    "rclone-list",
    "folder",
    sh`
    ${ALL_OBJECTS}
    command -v rclone >/dev/null || { echo "rclone not found: install rclone" >&2; exit 69; }
    remote=\${folder%%[:,]*}
    rclone listremotes --long | {
      while read -r name type; do
        if [ "$name" = "$remote:" ]; then line "$type"; fi
      done
      echo
    }
    errors=$(mktemp)
    result=0
    rclone lsf --files-only --format sp --separator " " -- "$folder" 2>"$errors" || result=$?
    said=$(cat "$errors")
    rm -f "$errors"
    # 3: there is no such directory yet.
    case $result/$said in
      0/*|3/*) ;;
      *)
        line "$said" >&2
        case $said in
          *"no such host"*|*refused*|*unreachable*|*timeout*|*"timed out"*) exit 66;;
        esac
        exit 1
        ;;
    esac
  `,
  ),
  put: verb(
    "rclone-put",
    "folder fsid lock object holder size",
    sh`
    ${ALL_OBJECTS}
    ${LOCKED}
    locked "$lock" 0
    RCLONE_S3_CHUNK_SIZE=\${RCLONE_S3_CHUNK_SIZE:-$size}
    RCLONE_S3_UPLOAD_CONCURRENCY=\${RCLONE_S3_UPLOAD_CONCURRENCY:-2}
    export RCLONE_S3_CHUNK_SIZE RCLONE_S3_UPLOAD_CONCURRENCY
    exec rclone rcat -- "$folder$object"
  `,
  ),
  commit: verb(
    "rclone-commit",
    "folder fsid lock object sum bytes part? kept? uuid?",
    sh`
    ${ALL_OBJECTS}
    ${LOCKED}
    ${SUM_FILE}
    locked "$lock" 10
    size=$(rclone lsf --format s -- "$folder$object")
    [ "$size" = "$bytes" ] || { echo "only \${size:-none} of $bytes bytes arrived" >&2; exit 1; }
    sumfile "$object" "$sum" "$bytes" | rclone rcat -- "$folder$object${SUM}"
  `,
  ),
  get: verb(
    "rclone-get",
    "folder fsid how holder objects...",
    sh`
    ${ALL_OBJECTS}
    get() { rclone cat -- "$folder$1"; }
    every() { for object; do get "$object"; done; }
    ${GET}
  `,
  ),
  delete: verb(
    "rclone-delete",
    "folder fsid lock objects...",
    sh`
    ${ALL_OBJECTS}
    ${LOCKED}
    locked "$lock" 10
    # One after the other, as they are given: each stream before what it builds on.
    for object; do line "$object"; done | rclone delete --checkers 1 --transfers 1 --files-from-raw - -- "$folder"
  `,
  ),
};

/** The checksum objects in a text of several, by the name of what they are of. */
export const parseSums = (text: string) =>
  new Map(
    [...text.matchAll(/^([0-9a-f]{64}) [ *]([^\n]*)/gm)].map(([, sum = "", object = ""]) => [
      object,
      sum,
    ]),
  );

const uuidOrNull = (text: string) => (text === "-" ? null : text);
const UUID = "-|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}";
const LISTED = new RegExp(
  `^ID (\\d+) gen \\d+ cgen (\\d+) top level \\d+ parent_uuid (${UUID})\\s+received_uuid (${UUID})\\s+uuid (${UUID})\\s+path (?:<FS_TREE>/)?(.*)$`,
  "s",
);
const LISTED_MADE = new RegExp(
  `^ID \\d+ gen \\d+ cgen \\d+ top level \\d+ otime (?:(\\S+) (\\S+)|-)\\s+uuid (${UUID})\\s+path (?:<FS_TREE>/)?(.*)$`,
  "s",
);
const LISTED_READONLY = /^ID (\d+) gen \d+ top level \d+ path (?:<FS_TREE>\/)?(.*)$/s;

/** The entries of `btrfs subvolume list`, one at a time: there can be many. A line of no known shape continues a path with a line break. Errors: Failure. */
function* listedLines(text: string, shape: RegExp): Generator<RegExpExecArray> {
  let last: RegExpExecArray | null = null;
  // What ends in a line break has an empty line behind it: a name can end so.
  for (let from = 0, to = 0; text !== "" && from <= text.length; from = to + 1) {
    to = text.indexOf("\n", from);
    if (to < 0) to = text.length;
    const line = text.slice(from, to);
    const match = shape.exec(line);
    const longer: RegExpExecArray | null =
      match === null && last !== null ? shape.exec(`${last[0]}\n${line}`) : null;
    if (match === null && longer === null)
      throw new Failure(`"btrfs subvolume list" printed something unknown: ${line}`);
    if (match !== null && last !== null) yield last;
    last = match ?? longer;
  }
  if (last !== null) yield last;
}

/**
 * Reads `btrfs subvolume list -a -c -u -q -R` and `-a -r` of one filesystem (btrfs-subvolume(8)). With
 * -a all paths count from the top level, some with a mark; without, some count from where one asks.
 */
export function parseSubvolumes(all: string, readonlyOnes: string): Subvolume[] {
  const readonly = new Set<string>();
  for (const [, id, path] of listedLines(readonlyOnes, LISTED_READONLY))
    readonly.add(`${id} ${path}`);
  const subvolumes: Subvolume[] = [];
  for (const match of listedLines(all, LISTED)) {
    const [, id, cgen, parent, received, uuid, path] = match as unknown as [
      string,
      string,
      string,
      string,
      string,
      string,
      string,
    ];
    subvolumes.push({
      id: Number(id),
      path,
      uuid,
      parentUuid: uuidOrNull(parent),
      receivedUuid: uuidOrNull(received),
      readonly: readonly.has(`${id} ${path}`),
      cgen: Number(cgen),
    });
  }
  // Any user can make subvolumes, and a name with a line break could pass for a subvolume of its own:
  // one that matters would need a path, an ID or a UUID that is somebody's already.
  for (const key of ["id", "uuid", "path"] as const) {
    const seen = new Set<Subvolume[typeof key]>();
    for (const one of subvolumes)
      if (seen.size === seen.add(one[key]).size)
        throw new Failure(
          `"btrfs subvolume list" tells of ${one[key]} twice; is there a line break in the name of a subvolume? See ${one.path}`,
        );
  }
  return subvolumes;
}

/**
 * In which generation a snapshot was changed last, as the head of its stream says (linux/fs/btrfs/send.h: its path, UUID and ctransid,
 * behind a magic, a version and the header of the command). Errors: Failure for any other shape.
 */
export function changedIn(head: string, snapshot: Subvolume): number {
  const bytes = Buffer.from(head, "hex");
  const at = 31 + (bytes.length > 31 ? bytes.readUInt16LE(29) : 0);
  const begins =
    bytes.toString("latin1", 0, 13) === "btrfs-stream\0" &&
    bytes.length >= at + 32 &&
    bytes.readUInt16LE(27) === 15;
  const [uuid, ctransid] = [0x0010_0001, 0x0008_0002]; // their lengths and numbers
  if (
    !begins ||
    bytes.readUInt32LE(at) !== uuid ||
    bytes.readUInt32LE(at + 20) !== ctransid ||
    bytes.toString("hex", at + 4, at + 20) !== dataOf(snapshot).replaceAll("-", "")
  )
    throw new Failure(`"btrfs send" began with something unknown: ${head.slice(0, 200)}`);
  return Number(bytes.readBigUInt64LE(at + 24));
}

/** A field of `btrfs subvolume show`. */
function shownField(text: string, field: string): string {
  const value = new RegExp(`^\\s+${field}:\\s+(\\S+)`, "m").exec(text)?.[1];
  if (value === undefined)
    throw new Failure(`"btrfs subvolume show" printed no "${field}":\n${text}`);
  return value;
}

export type Mount = {
  readonly id: string;
  readonly parent: string;
  readonly root: string;
  readonly path: string;
  readonly device: string;
  readonly readonly: boolean;
};

/** Reads /proc/self/mountinfo (proc(5)): `root` is the path on the filesystem of `device` that is mounted at `path`. */
export function parseMounts(text: string): Mount[] {
  const unescape = (word = "") =>
    word.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(parseInt(octal, 8)));
  return text.split("\n").map((line) => {
    const words = line.split(" ");
    const readonly = [words[5], words.at(-1)].some((options) => options?.split(",").includes("ro"));
    return {
      id: words[0] ?? "",
      parent: words[1] ?? "",
      root: unescape(words[3]),
      path: unescape(words[4]),
      device: unescape(words[words.indexOf("-") + 2]),
      readonly,
    };
  });
}

/** The path from the filesystem's top level ("/…") of a resolved path, and the mount it is seen through. */
export function placeOn(mounts: readonly Mount[], path: string): { mount: Mount; top: string } {
  const known = new Set(mounts.map(({ id }) => id));
  const above = mounts.filter((m) => isWithin(path, m.path));
  // As the kernel walks: what is mounted over a folder hides what was mounted below it.
  const next = (mount?: Mount) =>
    above
      .filter((m) =>
        mount === undefined
          ? !known.has(m.parent) || m.parent === m.id
          : m.parent === mount.id && m !== mount,
      )
      .reduce<Mount | undefined>(
        (first, m) => (first === undefined || m.path.length <= first.path.length ? m : first),
        undefined,
      );
  let mount = next();
  for (let inner = mount; inner !== undefined; inner = next(inner)) mount = inner;
  if (mount === undefined) throw new Failure(`${path}: not found among the mounts`);
  const rest = mount.path === "/" ? path : path.slice(mount.path.length);
  return { mount, top: withoutSlash(normalize(`${mount.root}/${rest}`)) };
}

/**
 * The filesystem whose files show `fsid` (hexadecimal, from `stat -f -c %i`): btrfs_statfs() in the
 * kernel folds the UUID into it and adds the ID of the subvolume. Needs no root, unlike blkid.
 */
export function filesystemOf(fsid: string, root: number, uuids: readonly string[]): string | null {
  const shown = BigInt(`0x${fsid}`);
  return (
    uuids.find((uuid) => {
      if (!new RegExp(`^(${UUID})$`).test(uuid)) return false;
      const hex = uuid.replaceAll("-", "");
      const [a, b, c, d] = [0, 8, 16, 24].map((at) => BigInt(`0x${hex.slice(at, at + 8)}`)) as [
        bigint,
        bigint,
        bigint,
        bigint,
      ];
      return (((a ^ c) << 32n) | (b ^ d)) === (shown ^ BigInt(root));
    }) ?? null
  );
}

/** The ID of the subvolume that a path from the filesystem's top level is in. */
function rootOf(top: string, subvolumes: readonly Subvolume[]): number {
  const above = subvolumes.filter(({ path }) => isWithin(top, `/${path}`));
  return above.reduce((deepest, one) => (one.path.length > deepest.path.length ? one : deepest), {
    id: 5,
    path: "",
  }).id;
}

/** A directory that was looked at. `filesystem` is null where it is not btrfs; `fsid` is the kernel's, of its subvolume; `free` and `size`: bytes there. */
export type Place = {
  readonly path: string;
  readonly inode: number;
  readonly fsid: string;
  readonly filesystem: string | null;
  readonly root: number;
  readonly free: number;
  readonly size: number;
};

/** All that `open` tells. `exists` is false for a folder that would have to be made; then `place` is its parent. */
export type Inspection = {
  readonly host: string;
  /** Whether zstd is installed there. */
  readonly zstd: boolean;
  /** The newest protocol of send streams that kernel and btrfs-progs know; 1 where it was not asked for. */
  readonly protocol: number;
  readonly exists: boolean;
  readonly locked: boolean;
  /** The process that holds the lock there. */
  readonly holder: string;
  readonly place: Place;
  /** The folder's path from the filesystem's top level. */
  readonly top: string;
  readonly source: (Place & { readonly uuid: string; readonly top: string }) | null;
  readonly mounts: readonly Mount[];
  /** All of its filesystem's; only those in the folder where we are not root (`alone`), and without UUIDs: what has a pin's name has its UUID. */
  readonly subvolumes: readonly Subvolume[];
  readonly alone: boolean;
  readonly entries: ReadonlySet<string>;
  /** Plain files in it, where it is opened for stored streams. */
  readonly files: readonly StoredFile[];
  /** When they were written, in ms since 1970. */
  readonly written: ReadonlyMap<string, number>;
  readonly record: RecordFile;
  readonly old: OldRecord;
  /** What tells one mounting of the folder's filesystem from others: the host's boot, and the inode of the filesystem in /sys/fs/btrfs. */
  readonly since: string;
  /** Our user ID there. */
  readonly user: string;
  /** Verbs can work behind the fence there: see PRELUDE. */
  readonly fenced: boolean;
  /** Else the first directory on the way there that others than root and we can change, if there is one. */
  readonly strange: string;
  /** The folder and what this program keeps in it belong to the user that we are there, or to root. */
  readonly trusted: boolean;
};

/** Reads lines of a size, the time of writing where it is known, and a name. */
const parseFiles = (text: string) =>
  [...text.matchAll(/^(\d+)(?:\/(\d+))? (?:\.\/)?([^\n]*)/gm)].map(
    ([, bytes, seconds, name = ""]) => ({
      name,
      bytes: Number(bytes),
      written: Number(seconds ?? NaN) * 1000,
    }),
  );

/** What `open` prints of any place, and what only of some. */
const ALWAYS = [
  "host",
  "zstd",
  "boot",
  "filesystems",
  "fence",
  "strange",
  "user",
  "inodes",
  "places",
  "mounts",
  "record",
  "stream",
];
const SOMETIMES = [
  "source",
  "folder",
  "missing",
  "locked",
  "entries",
  "old",
  "files",
  "subvolumes",
  "readonly",
  "roots",
  "alone",
  "end",
];

/** The sections of what `open` printed. Errors: Failure for one that is unknown, or comes twice. */
function sectionsOf(output: string, nonce: string): Map<string, string> {
  if (!output.startsWith(`\n${nonce} `))
    throw new Failure(
      `the login shell there prints something of its own, which would damage streams: ${output.trim().slice(0, 100)}`,
    );
  const sections = new Map<string, string>();
  for (const part of output.split(`\n${nonce} `).slice(1)) {
    const at = part.indexOf("\n");
    const name = part.slice(0, at);
    if (sections.has(name) || ![...ALWAYS, ...SOMETIMES].includes(name))
      throw new Failure(`the host prints what it was not asked for: ${JSON.stringify(name)}`);
    sections.set(name, part.slice(at + 1).replace(/\n$/, ""));
  }
  return sections;
}

/** Checks that a host has told all that it was asked for, and nothing of another shape. Errors: Failure. */
function checkAnswer(
  output: string,
  nonce: string,
  { source = "" }: Pick<Opening, "source">,
): void {
  const sections = sectionsOf(output, nonce);
  const wrong = (name: string) =>
    new Failure(`the host does not print what it was asked for: ${name}`);
  const lacking = ALWAYS.find((name) => !sections.has(name));
  if (lacking !== undefined) throw wrong(lacking);
  if (sections.has("source") !== (source !== "")) throw wrong("source");
  if (
    sections.has("folder") === sections.has("missing") ||
    sections.has("folder") !== sections.has("entries")
  )
    throw wrong("folder");
  const path = /^\/[^\0]*$/;
  const shapes: Record<string, RegExp> = {
    source: path,
    folder: path,
    missing: path,
    host: /^[^\n\0]+$/,
    user: /^\d+$/,
    locked: /^\d+$/,
    fence: /^(yes)?$/,
    roots: /^(\d+\n)*\d+$/,
    inodes: /^(\d+ \d+ \S+\n)*\d+ \d+ \S+$/,
    places: /^([0-9a-f]+ [0-9a-f]+ \d+ \d+ \d+\n)*[0-9a-f]+ [0-9a-f]+ \d+ \d+ \d+$/,
  };
  for (const [name, shape] of Object.entries(shapes)) {
    const text = sections.get(name);
    const real = shape !== path || text === undefined || text === withoutSlash(normalize(text));
    if (text !== undefined && !(shape.test(text) && real)) throw wrong(name);
  }
}

/** Reads what `open` printed. Errors: Failure for any shape that is not known. */
export function parseInspection(output: string, nonce: string, folder: string): Inspection {
  const sections = sectionsOf(output, nonce);
  const section = (name: string) => sections.get(name) ?? "";
  const mounts = parseMounts(section("mounts"));
  const record = parseRecord(section("record"));
  const files = parseFiles(section("files"));
  const exists = sections.has("folder");
  const paths = [
    ...(sections.has("source") ? [section("source")] : []),
    section(exists ? "folder" : "missing"),
  ];
  const seen = paths.map((path) => placeOn(mounts, path));
  const { mount, top } = seen.at(-1) as (typeof seen)[0];
  const alone = sections.has("alone");
  const subvolumes = alone
    ? parseAlone(section("alone"), top, record)
    : parseSubvolumes(section("subvolumes"), section("readonly"));
  const [inodes, shown] = (["inodes", "places"] as const).map((name) =>
    section(name)
      .split("\n")
      .map((line) => line.split(" ")),
  ) as [string[][], string[][]];
  const roots = alone
    ? section("roots").split("\n").map(Number)
    : seen.map(({ top }) => rootOf(top, subvolumes));
  const mounted = new Map(
    section("filesystems")
      .split("\n")
      .map((line) => [line.slice(line.lastIndexOf("/") + 1), line.split(" ")[0] ?? ""]),
  );
  const places = paths.map((path, i): Place => {
    const [[inode = ""] = [], [fsid = "", type, blocks, size, all] = []] = [inodes[i], shown[i]];
    if (path === "" || !/^\d+$/.test(inode) || !/^[0-9a-f]+$/.test(fsid))
      throw new Failure(`cannot read what "stat" printed of ${path}: ${inode} ${fsid}`);
    const root = type === BTRFS_MAGIC && !sections.has("files") ? (roots[i] ?? 0) : 0;
    // SOURCE can lie on another filesystem than the one whose subvolumes were listed, which is an error anyway.
    const filesystem =
      root === 0
        ? null
        : (filesystemOf(fsid, root, [...mounted.keys()]) ??
          (i === 0 && paths.length > 1 ? `with the ID ${fsid}` : null));
    if (root !== 0 && filesystem === null)
      throw new Failure(`${path}: its filesystem is not in /sys/fs/btrfs`);
    return {
      path,
      inode: Number(inode),
      fsid,
      filesystem,
      root,
      free: Number(blocks) * Number(size),
      size: Number(all) * Number(size),
    };
  });
  const here = places.at(-1) as Place;
  const source =
    places.length > 1 ? { ...(places[0] as Place), top: seen[0]?.top as string } : null;
  // Below a bind mount of a plain folder, btrfs receive cannot find the parent.
  if (
    exists &&
    !alone &&
    here.filesystem !== null &&
    mount.root !== "/" &&
    !subvolumes.some(({ path }) => `/${path}` === mount.root)
  )
    throw new Failure(
      `${here.path} is below ${mount.path}, a bind mount of the plain folder ${mount.root} of its filesystem: use the path below that filesystem's own mount point`,
    );
  const user = section("user");
  return {
    since:
      here.filesystem === null ? "" : `${section("boot")}/${mounted.get(here.filesystem) ?? ""}`,
    user,
    fenced: section("fence") !== "",
    strange: section("strange"),
    trusted: inodes
      .slice(source === null ? 0 : 1)
      .every(
        ([, owner, mode = ""]) =>
          (owner === user || owner === "0") && !/^.(?:....w|.{7}w)/.test(mode),
      ),
    host: section("host"),
    zstd: section("zstd") !== "",
    protocol: parseProtocol(section("stream")),
    exists,
    locked: sections.has("locked"),
    holder: section("locked"),
    place: here,
    top: exists ? top : `${top === "/" ? "" : top}${folder.slice(folder.lastIndexOf("/"))}`,
    source: source && {
      ...source,
      uuid:
        (alone || source.filesystem !== here.filesystem
          ? undefined
          : subvolumes.find(({ id }) => id === source.root)?.uuid) ?? "",
    },
    mounts,
    subvolumes,
    alone,
    entries: new Set(section("entries").split("\n")),
    files,
    written: new Map(files.map(({ name, written }) => [name, written])),
    record,
    old: parseOldRecord(section("old")),
  };
}

/** Reads the kernel's send_stream_version, and `btrfs --version`: btrfs-progs know protocol 2 since 6.0 (CHANGES). */
function parseProtocol(text: string): number {
  const [, kernel = "1", progs = "0"] = /^(\d+)\nbtrfs-progs v(\d+)/.exec(text) ?? [];
  return Number(kernel) >= 2 && Number(progs) >= 6 ? 2 : 1;
}

/** Reads what `open` tells whom btrfs gives no list. Errors: Failure for any other shape. */
function parseAlone(text: string, top: string, { chains }: RecordFile): Subvolume[] {
  const pins = new Map(
    [...chains.values()].flatMap(({ destinations = [] }) =>
      destinations.flatMap(({ pin }) => (pin === null ? [] : [[pin.name, pin.uuid] as const])),
    ),
  );
  return (text === "" ? [] : text.split("\n")).map((line) => {
    const [, id = "", ro, name = ""] = /^(\d+) ro=(true|false) \.\/(.*)$/.exec(line) ?? [];
    if (id === "") throw new Failure(`"btrfs property get" printed something unknown: ${line}`);
    return {
      id: Number(id),
      path: join(top, name).slice(1),
      uuid: pins.get(name) ?? `id:${id}`,
      parentUuid: null,
      receivedUuid: null,
      readonly: ro === "true",
    };
  });
}

/** A destination that a source knows. `pin` is what both share; `receiving`: announced by 0.3.1. */
export type KnownDestination = {
  readonly location: string;
  readonly filesystem: string | null;
  readonly pin: { readonly name: string; readonly uuid: string } | null;
  /** When a run last served it, as ISO 8601. */
  readonly last: string | null;
  /** UUIDs of snapshots that runs tried to send, and could not. */
  readonly failed?: readonly string[];
  readonly receiving?: readonly string[];
  /** Snapshots that were changed since they were taken, by UUID, and are all the same what is there: compared when that generation was their last. */
  readonly cleared?: Cleared;
};
export type Cleared = Readonly<Record<string, number>>;

/** What a record says of one prefix; every part optional, since a folder can be both ends of a chain. */
export type ChainRecord = {
  readonly owner?: Identity;
  /** The name that is being received, and `since` of the place (see Inspection) when that began. */
  readonly receiving?: string;
  readonly since?: string;
  /** UUIDs of backups that are another source's: never pruned. */
  readonly strangers?: readonly string[];
  /** The same, as only the file has it where they are many: all backups up to this subvolume ID, but for these UUIDs. */
  readonly elders?: { readonly until: number; readonly but: readonly string[] };
  readonly destinations?: readonly KnownDestination[];
  /** UUIDs that the data of backups go by which came when later ones were there. */
  readonly belated?: readonly string[];
  /** Names that the clock leapt to, and that --adopt-clock vouched for. */
  readonly leaps?: readonly string[];
  /** The destinations were written by a guarded key, which must not be believed. */
  readonly guarded?: true;
};

/** `.btrfs-backup.json`. Unreadable: nothing may be deleted there, and it is not written. */
export type RecordFile = {
  readonly chains: ReadonlyMap<string, ChainRecord>;
  readonly unreadable: string | null;
  /** By prefix, how many bytes the streams of a guarded key's backups had, by received UUID: see --max-bytes. */
  readonly stored?: ReadonlyMap<string, Stored>;
};
type Stored = Readonly<Record<string, number>>;

// One line a prefix, so that a shell can replace one; no prefix contains a slash, so "/" is free.
const RECORD_HEADER = `{"/": 1`;
const recordKey = (prefix: string) => `,${JSON.stringify(prefix)}: `;

/** No prefix contains a slash, so that this is none. */
const storedKey = (prefix: string) => recordKey(`/${prefix}`);

const recordLine = (prefix: string, chain: ChainRecord | Stored) =>
  recordKey(prefix) + JSON.stringify(chain);

/** Reads a record; what was not written by this program is unreadable. */
export function parseRecord(text: string): RecordFile {
  const chains = new Map<string, ChainRecord>();
  const stored = new Map<string, Stored>();
  if (text === "") return { chains, unreadable: null };
  try {
    const lines = text.trimEnd().split("\n");
    if (lines.shift() !== RECORD_HEADER || lines.pop() !== "}")
      throw new Error("it was not written by this version of btrfs-backup");
    for (const line of lines) {
      const [[prefix, chain] = ["", {}]] = Object.entries(
        JSON.parse(`{${line.slice(1)}}`) as Record<string, ChainRecord | Stored>,
      );
      if (line !== recordLine(prefix, chain))
        throw new Error("a line was not written by btrfs-backup");
      if (
        prefix.startsWith("/") &&
        Object.values(chain).every((value) => Number.isSafeInteger(value))
      )
        stored.set(prefix.slice(1), chain as Stored);
      else {
        checkChain(chain as ChainRecord);
        chains.set(prefix, chain as ChainRecord);
      }
    }
    return { chains, unreadable: null, ...(stored.size > 0 ? { stored } : {}) };
  } catch (error) {
    return { chains: new Map(), unreadable: (error as Error).message };
  }
}

function checkChain(chain: ChainRecord): void {
  const {
    owner,
    receiving,
    since,
    strangers,
    elders,
    destinations,
    leaps = [],
    belated = [],
    guarded,
  } = chain;
  const isText = (value: unknown) => typeof value === "string";
  const fine =
    Object.getPrototypeOf(chain) === Object.prototype &&
    (owner === undefined || [owner.uuid, owner.host, owner.path].every(isText)) &&
    [receiving, since].every((text) => text === undefined || isText(text)) &&
    (guarded === undefined || guarded === true) &&
    [leaps, belated].every((names) => Array.isArray(names) && names.every(isText)) &&
    (strangers === undefined || (Array.isArray(strangers) && strangers.every(isText))) &&
    (elders === undefined ||
      (strangers === undefined &&
        Number.isSafeInteger(elders.until) &&
        Array.isArray(elders.but) &&
        elders.but.every(isText))) &&
    (destinations === undefined ||
      (Array.isArray(destinations) &&
        destinations.every(
          (d) =>
            isText(d.location) &&
            [d.filesystem, d.last].every((v) => v === null || isText(v)) &&
            (d.receiving === undefined || Array.isArray(d.receiving)) &&
            (d.failed === undefined || (Array.isArray(d.failed) && d.failed.every(isText))) &&
            (d.cleared === undefined ||
              Object.values(d.cleared).every((n) => Number.isSafeInteger(n))) &&
            (d.pin === null || (isText(d.pin.name) && isText(d.pin.uuid))),
        )));
  if (!fine) throw new Error("a field is not what it should be");
}

/** How many strangers a record lists by their UUIDs; a line has room for some 2,000. */
const LISTED_STRANGERS = 500;

/** The backups of a prefix that a record can speak of. */
const ofPrefix = (standing: readonly Entry[], prefix: string) =>
  standing.filter(({ name }) => parseName(name, prefix) !== null);

/**
 * A chain's record as it is written: many strangers by a rule instead of a list. A rule that still says the same stays as it is: what
 * is not there just now may come back.
 */
export function asWritten(
  { strangers, elders, ...chain }: ChainRecord,
  standing: readonly Entry[],
  prefix: string,
): ChainRecord {
  const foreign = new Set(strangers);
  if (elders !== undefined) {
    const told = asRead({ elders }, standing, prefix).strangers ?? [];
    if (told.length === foreign.size && told.every((uuid) => foreign.has(uuid)))
      return { ...chain, elders };
  }
  if (strangers === undefined || strangers.length <= LISTED_STRANGERS)
    return strangers === undefined ? chain : { ...chain, strangers };
  const all = ofPrefix(standing, prefix);
  const until = all.reduce(
    (last, { id, uuid }) => (foreign.has(uuid) ? Math.max(last, id) : last),
    elders?.until ?? 0,
  );
  const own = all
    .filter(({ id, uuid }) => id <= until && !foreign.has(uuid))
    .map(({ uuid }) => uuid);
  return {
    ...chain,
    elders: {
      until,
      but: [...new Set([...(elders?.but ?? []).filter((uuid) => !foreign.has(uuid)), ...own])],
    },
  };
}

/** A chain's record with all strangers that are there by their UUIDs, beside the rule. */
export function asRead(
  chain: ChainRecord,
  standing: readonly Entry[],
  prefix: string,
): ChainRecord {
  const { elders } = chain;
  if (elders === undefined) return chain;
  const own = new Set(elders.but);
  return {
    ...chain,
    strangers: ofPrefix(standing, prefix)
      .filter(({ id, uuid }) => id <= elders.until && !own.has(uuid))
      .map(({ uuid }) => uuid),
  };
}

/** What 0.2 to 0.3.1 left in `.outstanding_transfers`: for each destination's ID the names it concerns. */
export type OldRecord = {
  readonly receiving: ReadonlyMap<string, readonly string[]>;
  readonly parents: ReadonlyMap<string, readonly string[]>;
};

/** Reads `{NAME: {"locks": [ID…], "parent_locks": [ID…]}}`, or 0.2's `{NAME: [ID…]}`; nonsense is nothing. */
export function parseOldRecord(text: string): OldRecord {
  const receiving = new Map<string, string[]>();
  const parents = new Map<string, string[]>();
  const add = (map: Map<string, string[]>, ids: unknown, name: string) => {
    for (const id of Array.isArray(ids) ? ids : [])
      if (typeof id === "string") map.set(id, [...(map.get(id) ?? []), name]);
  };
  try {
    for (const [name, locks] of Object.entries(
      JSON.parse(text === "" ? "{}" : text) as Record<
        string,
        { locks?: unknown; parent_locks?: unknown }
      >,
    )) {
      add(receiving, Array.isArray(locks) ? locks : locks.locks, name);
      add(parents, locks.parent_locks, name);
    }
  } catch {
    log.debug(".outstanding_transfers of btrfs-backup 0.3.1 cannot be read");
  }
  return { receiving, parents };
}

// ── 4. Locations ─────────────────────────────────────────────────────────────────────────

/** A place that was opened for one prefix: a snapshot folder, or where backups stand, or streams are stored. */
export type Folder = Omit<Inspection, "host" | "files"> & {
  readonly id: string;
  readonly host: Host;
  readonly hostName: string;
  readonly path: string;
  readonly prefix: string;
  /** Null where subvolumes stand. */
  readonly store: Store | null;
  /** Subvolumes directly in it, ours or not; or its stored streams. */
  readonly standing: readonly Entry[];
  /** Those that are ours by name, oldest first. */
  readonly snapshots: readonly Snapshot[];
  readonly chain: ChainRecord;
  readonly close: () => Promise<void>;
};

/** Stored streams. `type`: what rclone calls such a remote; `path` names its objects. */
export type Store = ReturnType<typeof parseStreams> & {
  readonly verbs: StoreVerbs;
  readonly type: string | null;
};

type Hosts = {
  readonly sshOptions: readonly string[];
  readonly sudo: boolean;
  readonly sshSudo: boolean;
};

/**
 * How to open a place: `look` locks nothing; else the seconds to wait for its lock. `unverified`: streams need no checksum object; `peer`: a host
 * whose protocol is asked for anyway; `ahead`: it begins to be opened, and locks and looks in its `turn`, unless it is `unwanted`; `locked` is
 * called as soon as it is, if not later.
 */
type Opening = {
  readonly prefix: string;
  readonly wait: "look" | number;
  readonly hosts: Hosts;
  readonly source?: string;
  readonly unverified?: boolean;
  readonly peer?: Host;
  readonly ahead?: { readonly turn: Promise<void>; readonly unwanted: AbortSignal };
  readonly locked?: () => void;
};

/** A source's UUID. The top level is not in the list of subvolumes. */
async function uuidOfSource(host: Host, { source, place, alone }: Inspection): Promise<string> {
  if (source?.root !== 5 || source.inode !== 256 || source.filesystem !== place.filesystem || alone)
    return source?.uuid ?? "";
  const shown = await ask(
    host,
    SHOW,
    { folder: source.path, fsid: `${source.fsid}/` },
    source.path,
  );
  return uuidOrNull(shownField(shown, "UUID")) ?? place.filesystem ?? ""; // old versions of mkfs gave it none
}

/**
 * The names that were announced before the filesystem was mounted as it is now. btrfs receive makes a subvolume read-only, with a
 * received UUID, while the data are still in memory: whatever such a backup looks like, after a power cut its files can be empty.
 */
export const doubtedIn = ({ record, since }: Pick<Folder, "record" | "since">) =>
  new Set(
    [...record.chains.values()].flatMap((chain) =>
      chain.receiving !== undefined && chain.since !== since ? [chain.receiving] : [],
    ),
  );

/** An opened folder as it looks to a prefix. */
function withPrefix(
  folder: Omit<Folder, "prefix" | "snapshots" | "chain">,
  prefix: string,
): Folder {
  const doubted = doubtedIn(folder);
  // What is in doubt is not complete, for whoever asks.
  const belated = new Set(folder.record.chains.get(prefix)?.belated);
  const standing =
    doubted.size + belated.size === 0
      ? folder.standing
      : folder.standing.map((entry) => {
          const isBelated = belated.has(entry.receivedUuid ?? "");
          return doubted.has(entry.name) || isBelated
            ? {
                ...entry,
                readonly: entry.readonly && !doubted.has(entry.name),
                ...(isBelated ? { belated: true as const } : {}),
              }
            : entry;
        });
  const snapshots = snapshotsAmong(standing, prefix, folder.source?.uuid ?? null);
  return { ...folder, prefix, standing, snapshots, chain: folder.record.chains.get(prefix) ?? {} };
}

/** Opens a place: one command that locks it, and tells all there is to know. Errors: those of `ask`. */
async function openFolder(location: Readable, path: string, opening: Opening): Promise<Folder> {
  if (location.kind === "rclone") return openRemote(location, path, opening);
  const { prefix, wait, hosts, source = "", peer, ahead, locked } = opening;
  const host = hostOf(location.host, hosts);
  const kind =
    location.kind === "raw" ? "streams" : peer !== undefined && sameHost(peer, host) ? "known" : "";
  const nonce = crypto.randomUUID();
  const asked = {
    nonce,
    wait: ahead === undefined ? String(wait) : "later",
    folder: path,
    prefix,
    source,
    kind,
    silence: silence(host),
  };
  const seen = locked && { line: `${nonce} locked`, tell: locked };
  const { output, release } = await hold(
    { ...host, fence: "try" },
    OPEN,
    asked,
    `${nonce} end`,
    location.id,
    {
      first: ahead?.turn.then(() => String(wait)),
      unwanted: ahead?.unwanted,
      seen,
      wait: wait === "look" ? 0 : wait,
    },
  );
  try {
    if (wait === "look") await release(); // nothing of it is left in the directory
    checkAnswer(output, nonce, opening);
    const inspection = parseInspection(output, nonce, path);
    if (wait !== "look") needOurs(inspection, location.id);
    const store =
      location.kind === "raw"
        ? { ...parseStreams(inspection.files, true), verbs: RAW, type: null }
        : null;
    const above = inspection.top === "/" ? "/" : `${inspection.top}/`;
    const subvolumes = inspection.subvolumes
      .filter(({ path }) => `/${path}`.startsWith(above))
      .flatMap((one): Entry[] => {
        const name = entryName(one.path.slice(above.length - 1));
        return name !== null && inspection.entries.has(name)
          ? [{ ...one, name, moment: null }]
          : [];
      });
    const real = inspection.exists
      ? inspection.place.path
      : join(inspection.place.path, basename(path));
    const folder = {
      ...inspection,
      source: inspection.source && {
        ...inspection.source,
        uuid: await uuidOfSource(host, inspection),
      },
    };
    const standing = store?.streams ?? subvolumes;
    const chains = new Map(
      [...folder.record.chains].map(([prefix, chain]) => [prefix, asRead(chain, standing, prefix)]),
    );
    return withPrefix(
      {
        ...folder,
        record: { ...folder.record, chains },
        id: location.id,
        host: behindFence(host, inspection),
        hostName: inspection.host,
        path: real,
        store,
        standing,
        close: release,
      },
      prefix,
    );
  } catch (error) {
    await release();
    throw error;
  }
}

/** A host as the verbs of a folder run there: in the mount namespace of the process that holds it, or in new ones, or in none. */
function behindFence(host: Host, { fenced, holder }: Pick<Inspection, "fenced" | "holder">): Host {
  if (!fenced) return host;
  return { ...host, fence: holder === "" ? "own" : { pid: holder } };
}

/** Errors: Failure where verbs would work without the fence in a place that is not ours alone. */
function needOurs({ fenced, strange }: Pick<Inspection, "fenced" | "strange">, id: string): void {
  if (fenced || strange === "") return;
  throw new Failure(
    `${id}: others can change ${strange}, and could lead us elsewhere from there. Where no mount namespace can be had (see "Security" in the README), a place must belong to us alone from / on: chown ${strange}, and chmod go-w`,
  );
}

/** Lists a remote of rclone, which nothing locks. Errors: those of `ask`. */
async function openRemote(
  { id }: Readable,
  path: string,
  { prefix, hosts, unverified = false }: Opening,
): Promise<Folder> {
  const host = { ...hostOf(null, hosts), sudo: false };
  const listed = await ask(host, RCLONE.list, { folder: path }, id);
  const [, type = "", files = ""] = /^(.*?)\n(?:\n)?(.*)$/s.exec(listed) ?? [];
  const store = {
    ...parseStreams(parseFiles(files), unverified),
    verbs: RCLONE,
    type: path.startsWith(":") ? (/^:([^,:]+)/.exec(path)?.[1] ?? "") : type,
  };
  const place = {
    path,
    inode: 0,
    fsid: "",
    filesystem: null,
    root: 0,
    free: Infinity,
    size: Infinity,
  };
  const nothing = {
    source: null,
    mounts: [],
    subvolumes: [],
    alone: false,
    entries: new Set<string>(),
    record: parseRecord(""),
    old: parseOldRecord(""),
    written: new Map<string, number>(),
    zstd: false,
    protocol: 1,
  };
  return withPrefix(
    {
      ...nothing,
      id,
      host,
      hostName: "",
      path,
      place,
      top: "",
      exists: true,
      locked: true,
      holder: "",
      since: "",
      user: "",
      trusted: true,
      fenced: false,
      strange: "",
      store,
      standing: store.streams,
      close: async () => {},
    },
    prefix,
  );
}

/** Opens a place, or goes on with what has begun to; if it was never locked before, makes it and its lock file once `check` has accepted what is there. */
async function openChecked(
  location: Readable,
  path: string,
  opening: Opening,
  check: (folder: Folder) => void,
  begun?: Promise<Folder>,
): Promise<Folder> {
  for (let first = begun; ; first = undefined) {
    const folder = await (first ?? openFolder(location, path, opening));
    try {
      check(folder);
    } catch (error) {
      await folder.close();
      throw error;
    }
    if (folder.locked || opening.wait === "look") return folder;
    await folder.close();
    await ask(
      folder.host,
      CREATE,
      { ...at(folder), prefix: opening.prefix },
      `cannot create ${path}`,
    );
  }
}

/** Opens a new destination as openChecked does, and makes the directories above it where it is safe to say that these are to be made. */
async function openNew(
  location: Readable,
  opening: Opening,
  source: Folder,
  isKnown: boolean,
  check: (folder: Folder) => void,
  begun?: Promise<Folder>,
): Promise<Folder> {
  try {
    return await openChecked(location, location.path, opening, check, begun);
  } catch (error) {
    if (!(error instanceof Missing) || isKnown) throw error;
    const isLooking = opening.wait === "look";
    const host = hostOf(location.host, opening.hosts);
    const asked = {
      folder: location.path,
      source: sameHost(host, source.host) ? source.path : "",
      how: isLooking ? "look" : "",
    };
    const made = await ask({ ...host, fence: "try" }, PARENTS, asked, location.id);
    log.info(`${location.id}: ${isLooking ? "would make" : "made"} the directory ${made.trim()}`);
    if (isLooking) throw error;
    return openChecked(location, location.path, opening, check);
  }
}

/** Errors: Failure where btrfs would not let us do more than take and delete snapshots. */
function needRoot(
  { alone, host, hostName }: Pick<Folder, "alone" | "host" | "hostName">,
  what: string,
): void {
  if (alone)
    throw new Failure(
      `${host.label || hostName}: ${what} needs root: use --${host.ssh === null ? "" : "ssh-"}sudo, or be root ${WITHOUT_ROOT}`,
    );
}

/** The prefixes of the names in a folder, sorted. */
export const prefixesIn = (entries: readonly Pick<Entry, "name">[]) =>
  [
    ...new Set(entries.map(({ name }) => prefixOf(name)).filter((prefix) => prefix !== null)),
  ].sort();

/**
 * Opens what can be given back: a folder of backups, or of snapshots, or a SOURCE, whose snapshot folder it
 * is then. Without a prefix, the one that its names have. Errors: those of `openFolder`, UsageError for several prefixes.
 */
async function openLocation(
  location: Readable,
  {
    prefix,
    wait,
    hosts,
    snapshotFolder,
    unverified = false,
  }: Omit<Opening, "prefix" | "source"> & { prefix: string | null; snapshotFolder: string },
): Promise<Folder> {
  let opening: Opening & { path: string } = {
    prefix: prefix ?? "",
    wait,
    hosts,
    unverified,
    path: location.path,
  };
  for (;;) {
    const folder = await openFolder(location, opening.path, opening);
    const prefixes = prefixesIn(folder.standing);
    const [only = opening.prefix] = prefixes;
    const asSource =
      folder.store === null &&
      opening.source === undefined &&
      prefixes.length === 0 &&
      folder.place.inode === 256 &&
      (snapshotFolder.startsWith("/") ||
        folder.entries.has(snapshotFolder.replace(/^\.\/|\/.*/g, "")));
    if (
      folder.exists &&
      (asSource || (prefix === null && prefixes.length <= 1 && only !== opening.prefix))
    ) {
      opening = asSource
        ? { ...opening, source: folder.path, path: resolve(folder.path, snapshotFolder) }
        : { ...opening, prefix: only };
      await folder.close();
      continue;
    }
    const isSnapshot =
      folder.store === null &&
      (folder.source ?? folder.place).inode === 256 &&
      prefixes.length === 0 &&
      prefixOf(basename(location.path)) !== null;
    const wrong = !folder.exists
      ? new Absent(`no such directory: ${folder.path} (is the disk mounted?)`)
      : prefix === null && prefixes.length > 1
        ? new UsageError(
            `${location.id} holds several prefixes, choose one with -p: ${prefixes.map((p) => JSON.stringify(p)).join(", ")}`,
          )
        : isSnapshot
          ? new UsageError(`${location.id} is a snapshot itself: name the folder that it is in`)
          : null;
    if (wrong === null) return folder;
    await folder.close();
    throw wrong;
  }
}

/** Whether a folder is where a source takes its snapshots, which need no received UUID, or one of backups. */
export function isSnapshotFolder({
  source,
  chain: { owner, destinations },
  snapshots,
  subvolumes,
  place,
}: Pick<Folder, "source" | "chain" | "snapshots" | "subvolumes" | "place">): boolean {
  if (source !== null) return true;
  // The source itself may be lost.
  if (owner !== undefined)
    return (
      owner.uuid === place.filesystem ||
      subvolumes.some(({ uuid }) => uuid === owner.uuid) ||
      snapshots.some(({ parentUuid }) => parentUuid === owner.uuid)
    );
  return (
    destinations !== undefined ||
    snapshots.some(({ readonly, receivedUuid }) => readonly && receivedUuid === null)
  );
}

/** What a folder can give back, oldest first. */
export function wholeIn(folder: Folder): Snapshot[] {
  const own = isSnapshotFolder(folder);
  const strangers = new Set(folder.chain.strangers);
  return folder.snapshots.filter(
    (entry) => (own ? entry.readonly : isComplete(entry)) && !strangers.has(entry.uuid),
  );
}

/** Warns of read-only subvolumes with one received UUID, among which `btrfs receive` could take the wrong one for a parent. */
function warnOfDuplicates({ standing, subvolumes, id }: Folder, report: Report): void {
  const ours = new Set(standing.map(({ receivedUuid }) => receivedUuid));
  const byUuid = groupBy(
    subvolumes.filter(
      ({ readonly, receivedUuid }) => readonly && receivedUuid !== null && ours.has(receivedUuid),
    ),
    ({ receivedUuid }) => receivedUuid,
  );
  const [same, ...more] = [...byUuid.values()].filter(({ length }) => length > 1);
  const others = more.length === 0 ? "" : ` (and ${count(more.length, "time")} more such)`;
  if (same)
    report.warning(
      `${id}: ${same.length} read-only subvolumes of its filesystem have the same received UUID, which can confuse "btrfs receive"; keep one of ${same.map(({ path }) => path).join(", ")}${others}`,
    );
}

/** The process whose end is the end of what we do in a folder on another host; here, our own process groups see to that. */
const holderOf = ({ host, holder }: Pick<Folder, "host" | "holder">) =>
  host.ssh === null ? "" : holder;

/** A folder's path, and what must still be there when a verb uses it. */
const at = ({ path, place, holder }: Pick<Folder, "path" | "place" | "holder">) => ({
  folder: path,
  fsid: `${place.fsid}/${holder}`,
});

const RECORD_BYTES = 90 * 1024; // a pipeline with it must fit into one argument of 128 KiB: execve(2)

const NO_RECORD = { header: "", key: "", value: "" } as const;

/** What the record verbs need to make a chain's line say `chain`: nothing if the file is not ours to write. */
function recordArguments(
  folder: Folder,
  chain: ChainRecord,
): { header: string; key: string; value: string } {
  const value = JSON.stringify(asWritten(chain, folder.standing, folder.prefix));
  if (Buffer.byteLength(value) > RECORD_BYTES)
    throw new Failure(`${folder.id}: its record would be larger than ${RECORD_BYTES} bytes`);
  return folder.record.unreadable === null
    ? { header: RECORD_HEADER, key: recordKey(folder.prefix), value }
    : NO_RECORD;
}

/** Whether two records say the same, in whatever order. */
export function sameRecord(a: ChainRecord, b: ChainRecord): boolean {
  const sorted = (chain: ChainRecord) =>
    JSON.stringify(Object.entries(chain).sort(([one], [other]) => (one < other ? -1 : 1)));
  return sorted(a) === sorted(b);
}

/** Writes a chain's record; `sync`: after everything else is on the disk. */
async function writeRecord(folder: Folder, chain: ChainRecord, sync = false): Promise<void> {
  const line = recordArguments(folder, chain);
  if (line.header !== "")
    await ask(
      folder.host,
      WRITE_RECORD,
      { ...at(folder), ...line, ...(sync ? { sync: "sync" } : {}) },
      `${folder.id}: cannot write .btrfs-backup.json`,
    );
}

/** Arguments in as few commands as they fit into; each will have `extra` bytes more there. */
function chunks(words: readonly string[], extra = 0): string[][] {
  let bytes = Infinity;
  const batches: string[][] = [];
  for (const word of words) {
    bytes += Buffer.byteLength(word) + extra + 8;
    if (bytes > RECORD_BYTES) {
      batches.push([]);
      bytes = Buffer.byteLength(word) + extra + 8;
    }
    batches.at(-1)?.push(word);
  }
  return batches;
}

type Deletion = { readonly convertRw: boolean; readonly sync: boolean };

/** Deletes subvolumes of a folder, if they still have their IDs (null: not known, where nobody else comes), as many with one command as its arguments can hold. */
async function deleteFrom(
  folder: Folder,
  going: readonly { readonly name: string; readonly id: number | null }[],
  { convertRw, sync }: Deletion,
): Promise<void> {
  const idOf = new Map(going.map(({ name, id }) => [`./${name}`, id]));
  const batches = chunks([...idOf.keys()], 12); // and the ID
  for (const [i, batch] of batches.entries()) {
    const last = sync && i === batches.length - 1;
    const ids = batch.flatMap((name) => idOf.get(name) ?? []).join(" ");
    await ask(
      folder.host,
      DELETE,
      {
        convert: convertRw ? "rw" : "",
        sync: last ? "sync" : "",
        ...at(folder),
        top: folder.top,
        ids,
        names: batch,
      },
      `${folder.id}: cannot delete ${count(batch.length, "subvolume")}`,
    );
  }
}

/** What stands at a destination, as planning sees it. */
export type Standing = {
  /** All that is complete, by any name: what a transfer can build on, and need not send again. */
  readonly held: readonly Entry[];
  /** The complete ones that are this source's and ours by name: what retention is about. */
  readonly backups: readonly Backup[];
  /** By UUID, where backups were copied on to: what the next copy builds on stays. */
  readonly copied: ReadonlyMap<string, string>;
  /** Names that a snapshot cannot get: "leftover", or why. */
  readonly taken: ReadonlyMap<string, string>;
  /** Of streams, each needs its parent, and all that this needs: those of other sources there. Null where every backup is whole by itself. */
  readonly chained: readonly Entry[] | null;
  /** The UUID of the backup with the newest data, where `backups` are in the order of arrival, and some came belated. */
  readonly newest?: string | undefined;
};

/** How a stream goes to one destination: `rate` in bytes a second; `protocol` null for what btrfs takes by itself. */
export type Sending = Filters & {
  readonly rate: number | null;
  readonly protocol: string | null;
  readonly fullEvery: FullEvery | null;
  readonly resume: boolean;
  readonly spaceCheck: boolean;
  readonly trust: boolean;
};

/** How a stream is made: those that are made alike are the same. `chosen`: the protocol was not asked for. */
type Form = Pick<Sending, "rate" | "level" | "protocol"> & { readonly chosen?: boolean };

/** What a broken transfer left over there to go on from: `bytes` of them with a SHA-256. */
type Begun = Form & { readonly bytes: number; readonly sum: string };

/** Where a stream comes in. `stages`: the last ones of its pipeline; `finish` gets what was stored, and returns the bytes that are there; `kept`: what is there already. */
type Incoming = {
  readonly stages: readonly Stage[];
  readonly environment?: Record<string, string>;
  readonly finish?: (summed: Summed) => Promise<number>;
  readonly kept?: Begun;
};

/** A place that backups go to, whatever its kind. */
export interface Destination {
  readonly id: string;
  readonly standing: Standing;
  /** A command cannot be asked what it has: the last stream it took is remembered. Null for the others. */
  readonly stream: { readonly last: Memory | null } | null;
  readonly filesystem: string | null;
  /** Bytes that were free there when it was opened. */
  readonly free: number;
  /** Why nothing may be deleted there in this run. */
  readonly frozen: string | null;
  /** Null where each transfer has to look what it can go on from. */
  readonly form: (source: Folder) => Form | null;
  /** `isFollowed`: another transfer comes next, or else `settle`. Errors: Failure for what makes the transfer impossible. */
  readonly receive: (source: Folder, transfer: Transfer, isFollowed?: boolean) => Promise<Incoming>;
  /** What the last transfer left to the next is done, where there was no next. */
  readonly settle?: () => Promise<void>;
  /** Whether the backup of a snapshot is the same as that; null where nobody can tell. Errors: Failure. */
  readonly compare: ((source: Folder, snapshot: Snapshot) => Promise<boolean>) | null;
  /** What a snapshot's transfer has become there. */
  readonly arrived: (transfer: Transfer) => Backup;
  /** Clears away what a failed transfer of that name left, but for what the next one can go on from. */
  readonly discard: (name: string) => Promise<void>;
  /** Clears away what could be gone on from, if there is any. */
  readonly tidy: () => Promise<void>;
  /** Deletes backups, in that order; `free`: waits until their space is free. */
  readonly remove: (backups: readonly Backup[], free: boolean) => Promise<void>;
  readonly close: () => Promise<void>;
}

/** What stands in a destination folder. `announced` names may be leftovers of broken transfers. */
export function standingIn(
  folder: Pick<Folder, "standing" | "snapshots" | "entries" | "prefix">,
  { strangers, destinations = [] }: ChainRecord,
  announced: readonly string[],
): Standing {
  const held = folder.standing.filter(isComplete);
  const foreign = new Set(strangers);
  const copied = new Map(destinations.map(({ pin, location }) => [pin?.uuid ?? "", location]));
  const taken = new Map<string, string>();
  for (const name of folder.entries)
    if (parseName(name, folder.prefix) !== null)
      taken.set(name, "something that is not a subvolume has that name");
  for (const backup of folder.snapshots) {
    // btrfs receive gives a received UUID first and makes read-only then: killed between, it leaves both unlike.
    if (!backup.readonly && announced.includes(backup.name)) taken.set(backup.name, "leftover");
    else if (!backup.readonly && backup.receivedUuid === null)
      taken.set(
        backup.name,
        "a writable subvolume has that name, which no transfer of this program began",
      );
    else if (!backup.readonly) taken.set(backup.name, "the backup by that name was made writable");
    else if (backup.receivedUuid === null)
      taken.set(backup.name, "a snapshot that was not received has that name");
    else taken.set(backup.name, "a backup of other data has that name");
  }
  const backups = folder.snapshots.filter(
    (backup) => isComplete(backup) && !foreign.has(backup.uuid),
  );
  return { held, backups, copied, taken, chained: null };
}

type FolderOptions = Deletion & { readonly btrfsDebug: boolean; readonly sending: Sending };

/** Streams between hosts are compressed, others never. Errors: Failure where zstd is missing. */
function compressionBetween(source: Folder, target: Folder, level: string): string {
  if (level === "" || sameHost(source.host, target.host)) return "";
  for (const { zstd, host, hostName } of [source, target])
    if (!zstd) throw new Failure(`${host.label || hostName}: zstd not found: install zstd`);
  return level;
}

/** How a stream between two folders is made: with the newest protocol that both understand, if none is asked for. */
function formBetween(
  source: Folder,
  target: Folder,
  { level, rate, protocol }: Pick<Sending, "level" | "rate" | "protocol">,
): Form {
  const newest =
    source.protocol > 1 && (target.protocol > 1 || sameHost(source.host, target.host)) ? "2" : null;
  return {
    level: compressionBetween(source, target, level),
    rate,
    protocol: protocol ?? newest,
    chosen: protocol === null && newest !== null,
  };
}

/** What a record's line begins with while a name is received. */
const announcement = (name: string, { since }: Pick<Folder, "since">) =>
  `{"receiving":${JSON.stringify(name)},"since":${JSON.stringify(since)},`;

/** The receiving end of a transfer into a folder. `chain`: what its record says, with the announcement meanwhile. */
function receiving(
  folder: Folder,
  name: string,
  level: string,
  chain: ChainRecord | null,
  btrfsDebug: boolean,
  kept: Partial<Part> = {},
  isChecked = false,
  isFollowed = false,
): Stage {
  const { header, key, value } = chain === null ? NO_RECORD : recordArguments(folder, chain);
  const announced = {
    header,
    key,
    beginning: announcement(name, folder),
    rest: value.slice(1),
    ...(chain === null ? { sync: "later" } : isFollowed ? { sync: "next" } : {}),
  };
  // What was checked comes from us, and not from the file that it was kept in.
  const flag = `${btrfsDebug ? "-vv" : "-q"}${isChecked && kept.part !== undefined ? "C" : ""}`;
  const given = {
    flag,
    ...at(folder),
    level,
    holder: holderOf(folder),
    prefix: folder.prefix,
    ...announced,
    ...kept,
  };
  return staged("btrfs receive", folder.host, RECEIVE, given, {
    receives: true,
    shown: btrfsDebug,
  });
}

/**
 * The receiving end of a stream that another host, or a store, made: it is read along here, behind what it was compressed with, before any
 * `btrfs receive` of ours gets it. `end`: that, for what is compressed by a level. Errors: Failure where zstd is missing.
 */
function checked(
  target: Folder,
  level: string,
  { name, uuid, parent }: Omit<Expected, "alone">,
  end: (level: string) => Stage,
): Stage[] {
  const isElsewhere = target.host.ssh !== null;
  if (level !== "" && which.sync("zstd", { nothrow: true }) === null)
    throw new Failure("zstd not found: install zstd");
  const unpack: Stage[] = level === "" ? [] : [{ label: "zstd", command: "zstd -q -d -c" }];
  const pack: Stage[] =
    level === "" || !isElsewhere ? [] : [{ label: "zstd", command: `zstd -q -c -T2 -${level}` }];
  return [
    ...unpack,
    relaying({ check: { name, uuid, parent, alone: !target.fenced } }),
    ...pack,
    end(isElsewhere ? level : ""),
  ];
}

/** What a stream of a snapshot must say of itself. */
const expected = (source: Folder, { snapshot, parent }: Transfer): Omit<Expected, "alone"> => ({
  name: snapshot.name,
  uuid: source.alone ? "" : dataOf(snapshot),
  parent: parent && dataOf(parent),
});

/** Whether what a source sends is another host's word, which must be checked where it arrives. */
function mustBeChecked(source: Folder, target: Folder, { trust }: Pick<Sending, "trust">): boolean {
  const isForeign = source.host.ssh !== null && !sameHost(source.host, target.host);
  if (isForeign && trust)
    log.info(`${source.id}: its stream is received as it is, by --trust-stream`);
  return isForeign && !trust;
}

/** A file that a stream was kept in: its name without dot and end, and what it must be (see COMPLETE). */
type Part = {
  readonly part: string;
  readonly sum: string;
  readonly bytes: string;
  readonly kept: string;
};

const PART = /\.p([0-2])-(\d*)\.part$/;

/**
 * A stream that is kept as a file over there until it is whole, so that a later transfer can go on from what arrived. `taken`: uses
 * the file. Errors: NoSpace if that clearly takes more than there is.
 */
async function resumable(
  folder: Folder,
  source: Folder,
  transfer: Transfer,
  object: string,
  copies: number,
  sending: Sending,
  taken: (part: Part) => Promise<void>,
): Promise<Incoming> {
  const { host, prefix, id } = folder;
  const found = /^(\d+) ([0-9a-f]{64})  - \.\/\.(.*)$/m.exec(
    await ask(host, KEPT, { ...at(folder), prefix, object }, `${id}: cannot look for what is kept`),
  );
  const [, protocol = sending.protocol ?? "0", level = sending.level] =
    PART.exec(found?.[3] ?? "") ?? [];
  const kept: Begun = {
    bytes: Number(found?.[1] ?? 0),
    sum: found?.[2] ?? "",
    protocol: protocol === "0" ? null : protocol,
    level,
    rate: sending.rate,
  };
  const size = await streamBytes(source, transfer);
  const needed = Math.max(0, copies * size - kept.bytes);
  log.info(
    `${id}: ${kept.bytes > 0 ? `${inBytes(kept.bytes)} of ${transfer.snapshot.name} are there already; ` : ""}the stream of some ${inBytes(size)} is kept there until it is whole, which takes ${inBytes(needed)} of ${inBytes(folder.place.free)}`,
  );
  if (sending.spaceCheck && needed > folder.place.free)
    throw new NoSpace(
      `${transfer.snapshot.name} takes ${inBytes(needed)} there with --resume, and only ${inBytes(folder.place.free)} are free; --skip-space-check tries all the same`,
    );
  const part = `${object}.p${protocol}-${level}`;
  return {
    kept,
    stages: [
      relaying({ sum: true }),
      staged("storing", host, RAW.put, {
        ...at(folder),
        lock: prefix,
        object: part,
        holder: holderOf(folder),
        size: String(kept.bytes),
      }),
    ],
    async finish({ sum, bytes }) {
      await taken({ part, sum, bytes: String(kept.bytes + bytes), kept: String(kept.bytes) });
      return kept.bytes + bytes;
    },
  };
}

/** Whether a transfer can break and be gone on with: it goes over ssh. */
const canResume = (source: Folder, { host }: Folder, { resume }: Sending) =>
  resume && (source.host.ssh !== null || host.ssh !== null);

/** Removes what was kept to go on from, if a listing or this run knows of any. */
const tidying = (folder: Folder, used: () => boolean) => async () => {
  if (used() || [...folder.entries].some((name) => PART.test(name)))
    await ask(
      folder.host,
      TIDY,
      { ...at(folder), prefix: folder.prefix },
      `${folder.id}: cannot remove what is kept of a broken transfer`,
    );
};

/** The SHA-256 of all that a stream would carry of a snapshot. Errors: Failure. */
async function digestIn(folder: Folder, { name }: Entry): Promise<string> {
  const told = await ask(
    folder.host,
    DIGEST,
    { ...at(folder), snapshot: name },
    `${folder.id}: cannot read ${name}`,
  );
  return (
    /^[0-9a-f]{64}(?= )/.exec(told)?.[0] ??
    fail(`${folder.id}: cannot read ${name}: no SHA-256 was printed`)
  );
}

/** Errors: Failure. */
function fail(message: string): never {
  throw new Failure(message);
}

/** Waits for all, also where one fails. Errors: the first one's. */
async function allOf<T>(all: readonly Promise<T>[]): Promise<T[]> {
  const ended = await Promise.allSettled(all);
  return ended.map((one) => {
    if (one.status === "rejected") throw one.reason;
    return one.value;
  });
}

/** A btrfs folder as a destination: `again` looks at it anew; `owned` is its record from now on, `announced` what 0.3.1 began. */
function folderDestination(
  folder: Folder,
  again: () => Promise<Folder>,
  owned: ChainRecord,
  announced: readonly string[],
  options: FolderOptions,
): Destination {
  const { host, prefix, id } = folder;
  const { sending } = options;
  const { receiving: left, since: _, ...chain } = owned;
  let settled: ChainRecord = chain;
  const doubted = doubtedIn(folder);
  const here = new Set(folder.standing.map(({ receivedUuid }) => receivedUuid));
  let parts = false;
  let isAnnounced = false;
  return {
    id,
    stream: null,
    filesystem: folder.place.filesystem,
    free: folder.place.free,
    standing: standingIn(folder, settled, left === undefined ? announced : [...announced, left]),
    frozen:
      folder.record.unreadable === null
        ? null
        : `its .btrfs-backup.json cannot be read (${folder.record.unreadable}); move it aside and run once with --adopt`,
    form: (source) =>
      canResume(source, folder, sending) ? null : formBetween(source, folder, sending),
    async receive(source, transfer, isFollowed = false) {
      // A guarded key has to take its announcement back.
      isAnnounced = isFollowed && host.ssh === null;
      const form = formBetween(source, folder, sending);
      const isChecked = mustBeChecked(source, folder, sending);
      const data = dataOf(transfer.snapshot);
      const others = (settled.belated ?? []).filter((uuid) => uuid !== data && here.has(uuid));
      if (transfer.belated || settled.belated !== undefined)
        settled = { ...settled, belated: [...others, ...(transfer.belated ? [data] : [])] };
      const stages = (given: string, part?: Part) => {
        const end = (level: string) =>
          receiving(
            folder,
            transfer.snapshot.name,
            level,
            settled,
            options.btrfsDebug,
            part,
            isChecked,
            isAnnounced,
          );
        return isChecked ? checked(folder, given, expected(source, transfer), end) : [end(given)];
      };
      if (!canResume(source, folder, sending)) return { stages: stages(form.level) };
      parts = true;
      const object = streamName(transfer, ownerOf(settled.owner as Identity), {
        level: "",
        recipients: [],
      });
      return resumable(
        folder,
        source,
        transfer,
        object,
        2,
        { ...sending, ...form },
        async (part) => {
          const kept = staged(
            "reading",
            host,
            RAW.get,
            { ...at(folder), how: "", holder: holderOf(folder), objects: [`.${part.part}.part`] },
            { sends: true },
          );
          await pipeline([
            ...(isChecked ? [kept] : []),
            ...stages(PART.exec(`${part.part}.part`)?.[2] ?? form.level, part),
          ]);
        },
      );
    },
    async compare(source, snapshot) {
      const backup = dataFinder(folder.standing.filter(isComplete))(snapshot);
      if (backup === undefined) throw new Failure(`${id} has no backup of ${snapshot.name}`);
      const [ours, theirs] = await allOf([digestIn(source, snapshot), digestIn(folder, backup)]);
      return ours === theirs;
    },
    arrived(transfer) {
      here.add(dataOf(transfer.snapshot));
      return { ...arrived(transfer), id: ARRIVED };
    },
    async settle() {
      if (isAnnounced) await writeRecord(folder, settled, true);
      isAnnounced = false;
    },
    tidy: tidying(folder, () => parts),
    async discard(name) {
      await ask(
        host,
        DISCARD,
        {
          ...at(folder),
          prefix,
          name,
          ...recordArguments(folder, settled),
          how: doubted.has(name) ? "whole" : "",
        },
        `${id}: cannot remove what the broken transfer of ${name} left`,
      );
    },
    async remove(backups, free) {
      const news = backups.some(({ id }) => id === ARRIVED)
        ? byUuidOfData((await again()).standing)
        : new Map<string, Entry>();
      const going = backups.map((backup) =>
        backup.id === ARRIVED ? (news.get(dataOf(backup)) ?? backup) : backup,
      );
      await deleteFrom(folder, going, { ...options, sync: options.sync || free });
    },
    close: folder.close,
  };
}

/** The ID of a backup that has arrived in this run: it is looked up where it is needed. */
const ARRIVED = -1;

const byUuidOfData = (entries: readonly Entry[]) =>
  new Map(entries.filter(isComplete).map((entry) => [dataOf(entry), entry]));

/** A snapshot as the backup that its transfer makes. */
const arrived = ({ snapshot, belated }: Pick<Transfer, "snapshot" | "belated">): Backup => ({
  ...snapshot,
  receivedUuid: dataOf(snapshot),
  ...(belated ? { belated } : {}),
});

/** gpg(1) as we use it: neither a configuration file nor a signature makes it ask the network for a key, or add a reader. */
const GPG =
  "gpg --batch --no-tty --quiet --no-auto-key-locate --no-auto-key-retrieve --disable-dirmngr";

/** Encrypts for gpg's recipients, if there are any; compressed before, or not worth it. */
const encrypting = ({ recipients }: Filters): Stage[] =>
  recipients.length === 0
    ? []
    : [
        {
          label: "gpg",
          command: `${GPG} --no-encrypt-to --trust-model always --compress-algo none --encrypt${recipients.map((one) => ` --recipient ${keyOf(one)}`).join("")}`,
        },
      ];

const keys = new Map<string, string>();
/** The fingerprint of the one key in the keyring that a recipient means. Errors: Failure for none, or several. */
function keyOf(recipient: string): string {
  const known = keys.get(recipient);
  if (known !== undefined) return known;
  const { stdout } = spawnSync(
    "sh",
    ["-c", `${GPG} --with-colons --list-keys -- "$1"`, "sh", recipient],
    { encoding: "utf8" },
  );
  const [first, ...others] = usableKeys(stdout);
  const howTo = `"gpg --import FILE" takes a key into the keyring of whoever runs this`;
  if (first === undefined)
    throw new Failure(
      `--encrypt-to ${recipient}: gpg knows no key of that name which can encrypt; ${howTo}`,
    );
  if (others.length > 0)
    throw new Failure(
      `--encrypt-to ${recipient}: several keys have that name, say which by its fingerprint: ${[first, ...others].join(", ")}`,
    );
  keys.set(recipient, first);
  return first;
}

/**
 * The fingerprints of keys that can encrypt and are neither expired nor revoked nor disabled, in what `gpg --with-colons --list-keys`
 * printed (doc/DETAILS of GnuPG: the validity is the second field, the capabilities of the whole key are capitals in the twelfth).
 */
export function usableKeys(printed: string): string[] {
  const found: string[] = [];
  let usable = false;
  for (const line of printed.split("\n")) {
    const fields = line.split(":");
    const [type, validity = ""] = fields;
    const capabilities = fields[11] ?? "";
    if (type === "pub")
      usable =
        !"eird".includes(validity || "-") &&
        capabilities.includes("E") &&
        !capabilities.includes("D");
    if (type === "fpr" && usable) {
      found.push(fields[9] as string);
      usable = false; // those of its subkeys follow
    }
  }
  return found;
}

/** Errors: Failure if a stream of that source is to be compressed, and cannot be. */
function checkFilters(
  { zstd, host, hostName }: Pick<Folder, "zstd" | "host" | "hostName">,
  { level, recipients }: Filters,
): void {
  if (level !== "" && !zstd)
    throw new Failure(`${host.label || hostName}: zstd not found: install zstd`);
  if (recipients.length > 0 && which.sync("gpg", { nothrow: true }) === null)
    throw new Failure("gpg not found: install gnupg");
  for (const recipient of recipients) keyOf(recipient);
}

/** What is stored is meant to be understood for long: without being asked, by the protocol that btrfs send takes by itself. */
const storedForm = ({ level, rate, protocol }: Sending): Form => ({ level, rate, protocol });

/** What stands in a store, for a source that owns the streams of some lineages. */
function standingInStore(
  { streams, debris }: Store,
  prefix: string,
  lineages: ReadonlySet<string>,
): Standing {
  const held = streams.filter(isComplete);
  const backups = snapshotsAmong(
    held.filter(({ owner }) => lineages.has(owner.lineage)),
    prefix,
    null,
  );
  const taken = new Map(
    [...debris.keys()]
      .filter((name) => parseName(name, prefix) !== null)
      .map((name) => [name, "leftover"]),
  );
  return {
    held,
    backups,
    copied: new Map(),
    taken,
    chained: held.filter(({ owner }) => !lineages.has(owner.lineage)),
  };
}

/**
 * Stored streams as a destination. `again` lists them anew; `owner`: what names say of the source; `lock`: a
 * file that whatever writes to a remote holds locked, since the remote cannot be.
 */
function storeDestination(
  folder: Folder,
  store: Store,
  again: () => Promise<Folder>,
  standing: Standing,
  owner: Owner,
  lock: string,
  sending: Sending,
): Destination {
  const { id, host } = folder;
  const { verbs } = store;
  const place = { ...at(folder), lock: verbs === RCLONE ? lock : folder.prefix };
  const unsummed = store.unsummed.filter(({ name }) => parseName(name, folder.prefix) !== null);
  const drop = async (objects: readonly string[]) => {
    // A stream without its checksum object would count as lost, and a checksum object without its stream is only debris.
    const isSum = (object: string) => object.endsWith(SUM);
    for (const some of [objects.filter((one) => !isSum(one)), objects.filter(isSum)].flatMap(
      (all) => chunks(all),
    ))
      await ask(
        host,
        verbs.delete,
        { ...place, objects: some },
        `${id}: cannot delete ${count(some.length, "object")}`,
      );
  };
  let parts = false;
  const objects = new Map<string, string>();
  const inSource = dataFinder(standing.held);
  const nameOf = (transfer: Transfer) => streamName(transfer, owner, sending);
  const parentObject = (parent: Snapshot) =>
    objects.get(parent.uuid) ?? inSource(parent)?.uuid ?? null;
  return {
    id,
    stream: null,
    filesystem: null,
    free: folder.place.free,
    standing,
    frozen:
      unsummed.length === 0
        ? null
        : `${count(unsummed.length, "stream")} there ${unsummed.length === 1 ? "has" : "have"} no checksum object, first ${unsummed[0]?.uuid}: if these were lost, make them again (see the README), else delete the streams`,
    form: (source) =>
      verbs === RAW && canResume(source, folder, sending) ? null : storedForm(sending),
    async receive(source, transfer) {
      checkFilters(source, sending);
      const object = nameOf(transfer);
      if (verbs === RAW && canResume(source, folder, sending)) {
        parts = true;
        return resumable(folder, source, transfer, object, 1, sending, async (part) => {
          await ask(
            host,
            RAW.commit,
            { ...place, object, ...part },
            `${id}: cannot complete ${object}`,
          );
        });
      }
      const part = verbs === RCLONE ? await partFor(source, transfer, store, sending) : "";
      const put = staged(verbs === RCLONE ? "rclone" : "storing", host, verbs.put, {
        ...place,
        object,
        holder: holderOf(folder),
        size: part,
      });
      return {
        stages: [...encrypting(sending), relaying({ sum: true }), put],
        async finish({ sum, bytes }) {
          await ask(
            host,
            verbs.commit,
            { ...place, object, sum, bytes: String(bytes) },
            `${id}: cannot complete ${object}`,
          );
          return bytes;
        },
      };
    },
    compare: null,
    arrived(transfer) {
      const object = nameOf(transfer);
      objects.set(transfer.snapshot.uuid, object);
      return {
        ...arrived(transfer),
        uuid: object,
        parentUuid: transfer.parent && parentObject(transfer.parent),
      };
    },
    async discard(name) {
      const debris = (await again()).store?.debris.get(name) ?? [];
      await drop(debris.filter((object) => !sending.resume || !PART.test(object)));
    },
    tidy: tidying(folder, () => parts),
    remove: (backups) => drop(backups.flatMap(({ uuid }) => [uuid, uuid + SUM])),
    close: folder.close,
  };
}

const MIB = 2 ** 20;
const S3_OBJECT = 5 * 2 ** 40; // bytes; in at most 10,000 parts: the limits of S3

/** In how large parts S3 gets a stream of about that many bytes. Errors: Failure if no object of S3 can be that large. */
export function partSize(bytes: number): number {
  if (bytes > S3_OBJECT)
    throw new Failure(
      `the stream would have some ${inBytes(bytes)}, and an object of S3 at most ${inBytes(S3_OBJECT)}`,
    );
  // The estimate does not count every byte, and filters can add some.
  return Math.max(16 * MIB, Math.ceil((bytes * 1.05 + 64 * MIB) / 10_000 / MIB) * MIB);
}

/** Bytes as people read them, in powers of 1024. */
export const inBytes = (bytes: number) => {
  const unit = Math.min(5, Math.max(0, Math.floor(Math.log2(Math.max(bytes, 1)) / 10)));
  return `${unit === 0 ? bytes : (bytes / 2 ** (10 * unit)).toFixed(1)}${"BKMGTP"[unit]}`;
};

/** How many bytes a stream has that consists of what `estimate` printed; a command without data has some hundred. Errors: Failure for any other shape. */
export function estimatedBytes(printed: string): number {
  const lines = printed
    .split("\n")
    .filter(Boolean)
    .map((line) => /^ *(\d+) (?: len=(\d+)|([a-z_]+))$/.exec(line));
  if (
    lines.includes(null) ||
    !lines.some((line) => ["subvol", "snapshot"].includes(line?.[3] ?? ""))
  )
    throw new Failure(`"btrfs receive --dump" printed something unknown: ${printed.slice(0, 200)}`);
  return lines.reduce((sum, line) => sum + Number(line?.[1]) * Number(line?.[2] ?? 200), 0);
}

/** How many bytes a stream will have, but for some hundred a command. */
const streamBytes = async (source: Folder, { snapshot, parent }: Transfer) =>
  estimatedBytes(
    await ask(
      source.host,
      ESTIMATE,
      { ...at(source), snapshot: snapshot.name, parent: parent?.name ?? "" },
      `${source.id}: cannot estimate the stream of ${snapshot.name}`,
    ),
  );

/** The part size for a transfer to a remote, as rclone reads it. */
async function partFor(
  source: Folder,
  transfer: Transfer,
  { type }: Store,
  { level }: Sending,
): Promise<string> {
  const bytes = await streamBytes(source, transfer);
  log.debug(`the stream of ${transfer.snapshot.name} will have some ${inBytes(bytes)}`);
  // What is compressed can be much smaller, and other remotes are not bound by the limits of S3.
  return `${partSize(type === "s3" && level === "" ? bytes : Math.min(bytes, S3_OBJECT)) / MIB}M`;
}

/** The shell that runs the user's commands, if it can with pipefail: without, half a pipeline can fail unseen. */
async function commandShell(report: Report): Promise<string> {
  if (which.sync("bash", { nothrow: true }) !== null) return "bash -o pipefail";
  if ((await shell`${"sh -o pipefail -c :"}`).exitCode === 0) return "sh -o pipefail";
  report.warning(
    "there is no bash, and this sh has no pipefail: a failure inside of a shell:// command's pipeline may not be noticed",
  );
  return "sh";
}

/**
 * A command as a destination: a store that can only take. `run` is the shell for it, and `lock` the
 * file that it holds locked, so that a killed run's command and the next one never store side by side.
 */
function shellDestination(
  location: Location & { kind: "shell" },
  last: Memory | null,
  run: string,
  lock: string,
  chain: { prefix: string; source: string },
  sending: Sending,
): Destination {
  return {
    id: location.id,
    stream: { last },
    filesystem: null,
    free: Infinity,
    standing: { held: [], backups: [], copied: new Map(), taken: new Map(), chained: null },
    frozen: null,
    form: () => storedForm(sending),
    async receive(source, { snapshot, parent }) {
      checkFilters(source, sending);
      return {
        stages: [
          ...encrypting(sending),
          {
            label: location.id,
            command: `{ [ -f ${quote(lock)} ] || ( umask 077; exec dd if=/dev/null of=${quote(lock)} conv=excl oflag=nofollow status=none 2>/dev/null ) || :; [ -f ${quote(lock)} ] || exit 75; flock -n -o -E 75 ${quote(lock)} ${run} -c ${quote(location.command)}; }`,
          },
        ],
        environment: {
          BTRFS_BACKUP_NAME: snapshot.name,
          BTRFS_BACKUP_KIND: parent === null ? "full" : "incremental",
          BTRFS_BACKUP_PARENT: parent?.name ?? "",
          BTRFS_BACKUP_UUID: snapshot.uuid,
          BTRFS_BACKUP_PARENT_UUID: parent?.uuid ?? "",
          BTRFS_BACKUP_PREFIX: chain.prefix,
          BTRFS_BACKUP_SOURCE: chain.source,
          BTRFS_BACKUP_SUFFIX: suffixOf(sending),
        },
      };
    },
    compare: null,
    arrived,
    discard: async () => {},
    tidy: async () => {},
    remove: async () => {},
    close: async () => {},
  };
}

// ── 5. Plan ──────────────────────────────────────────────────────────────────────────────
// Pure functions: whatever is sent or deleted was decided here.

/** A snapshot with the reasons to keep it; without any, it goes. */
export type Decision<T extends Dated> = { readonly entry: T; readonly reasons: readonly string[] };

/**
 * Why a policy keeps each of `entries` (oldest first). Calendar words keep the first of a period,
 * so that what is kept stays the same for its whole life. `now` is wall-clock ms: windows like
 * `14d+` end at the newest entry, or now if that is dated in the future.
 */
export function retain<T extends Dated>(
  entries: readonly T[],
  policy: Policy | null,
  now: number,
): Decision<T>[] {
  const reasons = entries.map(() => [] as string[]);
  const newest = entries.at(-1);
  reasons.at(-1)?.push("newest");
  if (policy === null) reasons.forEach((r) => r.push("everything is kept"));
  else if (newest !== undefined) {
    const newestOnes = `one of the newest ${policy.newest}`;
    if (policy.newest > 0) for (const r of reasons.slice(-policy.newest)) r.push(newestOnes);
    for (const { unit, count } of policy.firstOf) {
      const firsts = new Map<number, number>();
      entries.forEach(
        ({ time }, i) => firsts.has(period(time, unit)) || firsts.set(period(time, unit), i),
      );
      const kept = [...firsts.values()];
      for (const i of count === Infinity ? kept : kept.slice(-count))
        reasons[i]?.push(
          `first of its ${UNITS[unit].noun} (${count === Infinity ? "*" : count}${unit})`,
        );
    }
    for (const { unit, count } of policy.within) {
      const from = before(Math.min(now, newest.time), count, unit);
      entries.forEach(
        ({ time }, i) =>
          time >= from && reasons[i]?.push(`within ${count === Infinity ? "*" : count}${unit}`),
      );
    }
  }
  return entries.map((entry, i) => ({ entry, reasons: reasons[i] ?? [] }));
}

/** How far a clock may go by itself: forward with nothing taken meanwhile, back by the widest change of zone. */
const LEAP = { forward: 30 * DURATION.d, times: 10, back: 26 * DURATION.h };

/**
 * Where the clock leapt, as the names of what was taken tell, which are in the order in which that was done: forward if it is more than 30
 * days, and more than ten times the longest time between others until then, after the newest of these; back if it is more than 26 hours.
 */
export function leapsAmong(entries: readonly Dated[]): number[] {
  const leaps: number[] = [];
  let [newest, longest] = [entries[0]?.time ?? 0, 0];
  for (let i = 1; i < entries.length; i++) {
    const { time } = entries[i] as Dated;
    const ahead = time - newest;
    if (
      (ahead > LEAP.forward && ahead > LEAP.times * longest) ||
      time < (entries[i - 1] as Dated).time - LEAP.back
    )
      leaps.push(i);
    longest = Math.max(longest, ahead);
    newest = Math.max(newest, time);
  }
  return leaps;
}

/** How many different days it takes to believe a clock again, and how many entries from before it leapt stay then at first. */
const BELIEVED = { days: 3, stay: 3 };
const LEAPT = "the clock leapt: ";

/**
 * Keeps what only a wrong clock would let go: by hours to years, nothing goes until there are entries of three days since it leapt, and
 * in that deletion the three newest from before stay. `adopted`: names that it leapt to, and that somebody vouches for.
 */
function despiteLeaps<T extends Dated>(
  decisions: readonly Decision<T>[],
  policy: Policy | null,
  adopted: readonly string[],
): Decision<T>[] {
  const all = decisions.map(({ entry }) => entry);
  const reasons = decisions.map((decision) => [...decision.reasons]);
  for (const leap of policy === null || policy.firstOf.length + policy.within.length === 0
    ? []
    : leapsAmong(all)) {
    const { name } = all[leap] as T;
    const days = new Set(all.slice(leap).map(({ time }) => period(time, "d"))).size;
    const isBelieved = days >= BELIEVED.days || adopted.includes(name);
    const newest = reasons.slice(Math.max(0, leap - BELIEVED.stay), leap);
    const older = reasons.slice(0, leap - newest.length);
    const isFirst = days <= BELIEVED.days || older.some((why) => why.length === 0);
    const held = !isBelieved ? reasons : isFirst ? newest : [];
    for (const why of held)
      if (why.length === 0)
        why.push(
          isBelieved
            ? `one of the newest ${BELIEVED.stay} from before the clock leapt`
            : LEAPT + name,
        );
  }
  return decisions.map(({ entry }, i) => ({ entry, reasons: reasons[i] ?? [] }));
}

/** The names that the clock leapt to in some rows of entries, and those of `before` that still stand there. */
export function leapNames(
  rows: readonly (readonly Dated[])[],
  before: readonly string[] = [],
): string[] {
  const stands = before.filter((name) => rows.some((row) => row.some((one) => one.name === name)));
  return [
    ...new Set([
      ...stands,
      ...rows.flatMap((row) => leapsAmong(row).map((i) => (row[i] as Dated).name)),
    ]),
  ];
}

/** What the clock leapt to, where that keeps everything. */
export const leaptTo = (decisions: readonly Decision<Dated>[]) =>
  decisions.find(({ reasons }) => reasons[0]?.startsWith(LEAPT))?.reasons[0]?.slice(LEAPT.length) ??
  null;

/** The newest snapshot, in the source's order, whose data is held by one of `held`. */
export function newestShared(
  snapshots: readonly Snapshot[],
  held: readonly Subvolume[],
): Snapshot | null {
  const find = dataFinder(held);
  return snapshots.findLast((snapshot) => find(snapshot) !== undefined) ?? null;
}

/** What is known of snapshots as parents of differences, by UUID. What is in none of the maps was not asked for. */
export type Facts = {
  /** All subvolumes of their filesystem. */
  readonly all: ReadonlyMap<string, Subvolume>;
  /** In which generation a snapshot was changed last. */
  readonly ctransids: ReadonlyMap<string, number>;
  /** The generation of the top directory, null where nobody can tell: a snapshot has it from its origin, and what is received from its parent, through any number of them. */
  readonly births: ReadonlyMap<string, number | null>;
  /** Why a difference would lose something, null if it would not; by `pairOf`. */
  readonly losses: ReadonlyMap<string, string | null>;
};

/** The key of a difference among the facts. */
const pairOf = (parent: Entry, snapshot: Entry) => `${parent.uuid} ${snapshot.uuid}`;

/** Where a subvolume comes from, itself first: its parent, that one's, and so on. The last may be gone. */
function lineOf(one: Subvolume, all: ReadonlyMap<string, Subvolume>): string[] {
  const line = [one.uuid];
  for (
    let above = one.parentUuid;
    above !== null && !line.includes(above);
    above = all.get(above)?.parentUuid ?? null
  )
    line.push(above);
  return line;
}

/**
 * Whether `btrfs send` can tell what changed between two subvolumes: it goes by inode numbers, which mean nothing where one was not
 * made from the other. What was taken here has them from SOURCE. What was received has them from its parent: of two such, one must have
 * been received on top of the other. Where what was between is gone, their top directories tell. Undefined as long as these are not known.
 */
export function related(a: Subvolume, b: Subvolume, { all, births }: Facts): boolean | undefined {
  if (a.receivedUuid === null && b.receivedUuid === null) return true;
  const [ours, theirs] = [lineOf(a, all), lineOf(b, all)];
  const both = a.receivedUuid !== null && b.receivedUuid !== null;
  if (both ? ours.includes(b.uuid) || theirs.includes(a.uuid) : ours.at(-1) === theirs.at(-1))
    return true;
  const isOpen = (line: readonly string[]) => !all.has(line.at(-1) as string);
  if (!isOpen(ours) && !isOpen(theirs)) return false;
  const [born, other] = [births.get(a.uuid), births.get(b.uuid)];
  return born === undefined || other === undefined ? undefined : born !== null && born === other;
}

/**
 * Whether a snapshot was changed after it was taken: it is as old as its source then, or older (DESIGN: ctransid and cgen). Deduplication
 * does so as well, without changing what is in it. What was received was written after it was made; who changes it takes its received UUID.
 */
export function changedSince(
  { uuid, receivedUuid, cgen }: Subvolume,
  { ctransids }: Pick<Facts, "ctransids">,
  cleared: Cleared,
): boolean | undefined {
  if (receivedUuid !== null || cgen === undefined) return false;
  const ctransid = ctransids.get(uuid);
  return ctransid === undefined ? undefined : ctransid > cgen && cleared[uuid] !== ctransid;
}

/**
 * Whether a subvolume is an earlier state of another one: that one was made from it, or from what it was taken of, later. A difference
 * to a later state, or to one from which the way led back, may lose something: see `lossIn`.
 */
export function isEarlierState(
  one: Subvolume,
  of: Subvolume,
  all: ReadonlyMap<string, Subvolume>,
): boolean {
  const line = lineOf(of, all);
  if (line.includes(one.uuid)) return true;
  // What is received on top of something is not as that is.
  const origin =
    one.receivedUuid === null && one.parentUuid !== null ? line.indexOf(one.parentUuid) : -1;
  const next = origin < 2 ? of : all.get(line[origin - 1] as string);
  return origin > 0 && one.cgen !== undefined && next?.cgen !== undefined && one.cgen <= next.cgen;
}

/** Whether it is one still: what was edited is no more what it was, whatever it was compared with. */
const isStillEarlier = (one: Subvolume, of: Subvolume, facts: Facts) =>
  changedSince(one, facts, {}) !== true && isEarlierState(one, of, facts.all);

/** A file that a difference changes: the commands that write to it, its size in the snapshot, and in the parent; null where it is not there. */
export type Rewritten = {
  readonly path: string;
  readonly ranges: readonly { readonly from: number; readonly to: number }[];
  readonly size: number;
  readonly before: number | null;
};

/** The largest block that btrfs stores a file's data in, in bytes: 4 KiB mostly, and a page where that is larger. */
const SECTOR = 65536;

/**
 * The file that would come out wrong of a difference, if there is one. A file that is made shorter keeps its last block as it is, and what is
 * behind its end stays on the disk. If it is longer in another subvolume, and has the same block, `btrfs send` takes that for
 * unchanged, and whoever receives it has zeros there. (Seen with Linux 6.18.)
 */
export const lossIn = (files: readonly Rewritten[]) =>
  files.find(
    ({ ranges, size, before }) =>
      before !== null &&
      size > before &&
      before % SECTOR !== 0 &&
      !ranges.some(({ from, to }) => from <= before && before < to),
  )?.path ?? null;

/** Why no difference to a snapshot can be made against a parent; null if it can, undefined as long as that is not known. */
export type Unfit = (parent: Snapshot, snapshot: Snapshot) => string | null | undefined;

/** What makes a parent: whether it is fit at all; and whether it is known to be an earlier state, which is preferred to all that is nearer. */
export type Fitness = {
  readonly unfit: Unfit;
  readonly isEarlier: (parent: Snapshot, snapshot: Snapshot) => boolean;
};
const ANY: Fitness = { unfit: () => null, isEarlier: () => true };

/** What a destination adds to the facts: what was compared with its backup there and is the same, and what is no parent there, with the reason. */
export type Verdicts = { cleared: Cleared; readonly refused: Map<string, string> };

/** Judges parents for a destination; those that `isThere` not yet are sent before in the same run, as they are. */
export function judge(
  facts: Facts,
  { cleared, refused }: Verdicts,
  isThere: (parent: Snapshot) => boolean,
): Fitness {
  const isEarlier = (parent: Snapshot, snapshot: Snapshot) =>
    isStillEarlier(parent, snapshot, facts);
  const unfit: Unfit = (parent, snapshot) => {
    const reason = refused.get(parent.uuid);
    if (reason !== undefined) return reason;
    const kin = related(parent, snapshot, facts);
    if (kin === false)
      return `${parent.name} was received, and ${snapshot.name} was not made from it`;
    const changed = changedSince(parent, facts, cleared);
    if (changed === true && isThere(parent))
      return `${parent.name} may have been edited since it was taken`;
    if (kin === undefined || changed === undefined) return undefined;
    return isEarlier(parent, snapshot) ? null : facts.losses.get(pairOf(parent, snapshot));
  };
  return { unfit, isEarlier };
}

/** How many that are not known to be earlier states are tried as a parent: to try one costs a walk through all that is different. */
const TRIES = 2;

/**
 * The nearest of what both sides hold which can be a parent, and why no nearer one can: an earlier state, or else the nearest
 * of what came earlier (the last one), or else of what came later (the first one).
 */
function nearestFit(
  snapshot: Snapshot,
  earlier: readonly Snapshot[],
  later: readonly Snapshot[],
  { unfit, isEarlier }: Fitness,
): Pick<Transfer, "parent" | "why"> {
  let why: string | undefined;
  const unsure: Snapshot[] = [];
  const isFit = (parent: Snapshot) => {
    const reason = unfit(parent, snapshot) ?? null;
    why ??= reason ?? undefined;
    return reason === null;
  };
  for (let i = earlier.length - 1; i >= 0; i--) {
    const parent = earlier[i] as Snapshot;
    if (!isEarlier(parent, snapshot)) unsure.push(parent);
    else if (isFit(parent)) return { parent, ...(why === undefined ? {} : { why }) };
  }
  const parent = [...unsure.slice(0, TRIES), ...later.slice(0, 1)].find(isFit) ?? null;
  return { parent, ...(why === undefined ? {} : { why }) };
}

/** `failed`: the UUIDs of what earlier runs tried to send, and could not; `backfill`: sends also what is older than the newest that both have. */
export type TransferOptions = {
  readonly policy: Policy | null;
  readonly incremental: boolean;
  readonly newestOnly: boolean;
  readonly now: number;
  readonly fullEvery: FullEvery | null;
  readonly backfill?: boolean;
  readonly failed?: ReadonlySet<string>;
};

/** Whether a stored chain of that many streams, the first one from `since`, ends before a snapshot of `time`. */
const chainEnds = (
  { length, since }: { length: number; since: number },
  time: number,
  { count, unit }: FullEvery,
) => (unit === null ? count > 0 && length >= count : before(time, count, unit) >= since);

/**
 * What a destination lacks of what its policy would keep, oldest first, each against what both sides hold by then and is nearest to it (see
 * `nearestFit`); in full if they share nothing. `snapshots` are in the source's order. Without a policy, what is older than the newest that
 * both have was deleted there, or left out on purpose: it is `skipped`.
 */
export function planTransfers(
  snapshots: readonly Snapshot[],
  { held, backups, taken, chained }: Standing,
  options: TransferOptions,
  fitness = ANY,
): { transfers: Transfer[]; conflicts: Conflict[]; skipped: number } {
  const find = dataFinder(held);
  const rank = new Map(snapshots.map((snapshot, i) => [snapshot.uuid, i]));
  const here = dataFinder(snapshots); // the relation is the same from both sides
  const gone = backups.filter((backup) => here(backup) === undefined);
  const kept = retain(
    arrange<Snapshot>([...gone, ...snapshots], ({ uuid }) => rank.get(uuid)),
    options.policy,
    options.now,
  );
  const wanted = new Set(
    kept.filter(({ reasons }) => reasons.length > 0).map(({ entry }) => entry.uuid),
  );
  const newest = snapshots.at(-1);
  const transfers: Transfer[] = [];
  const conflicts: Conflict[] = [];
  const standing = byUuid(chained === null ? [] : held);
  const shared: Snapshot[] = [];
  const chains = new Map<Snapshot | null, { length: number; since: number }>();
  const chainAt = (snapshot: Snapshot | null) => {
    const there = snapshot === null || chained === null ? undefined : find(snapshot);
    const streams = there === undefined ? [] : chainOf(there, standing);
    return { length: streams.length, since: timeIn(streams[0]?.name ?? "") ?? 0 };
  };
  /** What both have that is later than the snapshot at hand, the nearest last. */
  const later = snapshots.filter((snapshot) => find(snapshot) !== undefined).reverse();
  let skipped = 0;
  for (const snapshot of snapshots) {
    const there = find(snapshot);
    if (there === undefined) {
      // The newest always: a backup that is dated in the future must not stand in its place.
      if (snapshot !== newest && (options.newestOnly || !wanted.has(snapshot.uuid))) continue;
      const isBelated = later.length > 0;
      if (
        isBelated &&
        options.policy === null &&
        !options.backfill &&
        !options.failed?.has(snapshot.uuid)
      ) {
        skipped++;
        continue;
      }
      const obstacle = taken.get(snapshot.name);
      if (obstacle !== undefined && obstacle !== "leftover") {
        conflicts.push({ name: snapshot.name, uuid: snapshot.uuid, why: obstacle });
        continue;
      }
      const nearest = options.incremental
        ? nearestFit(snapshot, shared, later.slice(-1), fitness)
        : { parent: null };
      const chain = chains.get(nearest.parent) ?? chainAt(nearest.parent);
      const due =
        chained !== null &&
        options.fullEvery !== null &&
        chainEnds(chain, snapshot.time, options.fullEvery);
      const { parent } = due ? { parent: null } : nearest;
      transfers.push({
        snapshot,
        ...(due ? { parent } : nearest),
        ...(isBelated ? { belated: true } : {}),
      });
      chains.set(
        snapshot,
        parent === null
          ? { length: 1, since: snapshot.time }
          : { ...chain, length: chain.length + 1 },
      );
    } else later.pop();
    shared.push(snapshot);
  }
  return { transfers, conflicts, skipped };
}

/**
 * What a command gets, that cannot be asked what it has: what is newer than the last stream it
 * took, or only the newest if there was none.
 */
export function planStreams(
  snapshots: readonly Snapshot[],
  memory: Memory | null,
  options: { readonly incremental: boolean; readonly newestOnly: boolean; readonly prefix: string },
  fitness = ANY,
): Transfer[] {
  const last = memory === null ? -1 : snapshots.findIndex(({ uuid }) => uuid === memory.uuid);
  // The remembered snapshot is gone: its name still tells what came after it.
  const time = memory === null ? null : parseName(memory.name, options.prefix);
  const newer =
    last !== -1
      ? snapshots.slice(last + 1)
      : snapshots.filter((snapshot) => snapshot.time > (time ?? -Infinity));
  const sent = memory === null || options.newestOnly ? newer.slice(-1) : newer;
  return sent.map((snapshot, i) => {
    const parent = sent[i - 1] ?? snapshots[last];
    return {
      snapshot,
      ...nearestFit(
        snapshot,
        options.incremental && parent !== undefined ? [parent] : [],
        [],
        fitness,
      ),
    };
  });
}

/** What planning must know of the backups at a destination. */
type Kept = Pick<Standing, "backups" | "copied" | "chained" | "newest">;

/**
 * What retention does at a destination after its transfers. Strangers are not among `backups`.
 * The newest backup, the newest that the source still has (the pin) and what was copied on last stay, whatever
 * the policy; and of streams all that these build on.
 */
export function planDestination(
  snapshots: readonly Snapshot[],
  { backups, copied, chained, newest }: Kept,
  policy: Policy | null,
  now: number,
  adopted: readonly string[] = [],
): Decision<Backup>[] {
  const find = dataFinder(backups);
  const rank = new Map<string, number>();
  snapshots.forEach((snapshot, i) => {
    const backup = find(snapshot);
    if (backup !== undefined) rank.set(backup.uuid, i);
  });
  const pin = snapshots.findLast((snapshot) => find(snapshot) !== undefined);
  const pinned = pin && find(pin);
  const ordered = arrange(backups, ({ uuid }) => rank.get(uuid));
  const decisions = despiteLeaps(retain(ordered, policy, now), policy, adopted).map(
    ({ entry, reasons }) => {
      const last = entry.uuid === newest ? ["the newest of the data"] : [];
      const shared = [
        ...(entry === pinned ? ["the source"] : []),
        ...(copied.has(entry.uuid) ? [copied.get(entry.uuid)] : []),
      ];
      return {
        entry,
        reasons: [...reasons, ...last, ...shared.map((side) => `shared with ${side}`)],
      };
    },
  );
  const needed = neededBy(
    decisions.filter(({ reasons }) => reasons.length > 0).map(({ entry }) => entry),
    { backups, chained },
  );
  return decisions.map(({ entry, reasons }) => ({
    entry,
    reasons:
      reasons.length === 0 && needed.has(entry.uuid)
        ? [`needed by ${needed.get(entry.uuid)}`]
        : reasons,
  }));
}

/** By UUID, all that some backups, and the streams of others, build on, and the name of one that does. */
function neededBy(
  kept: readonly Backup[],
  { backups, chained }: Pick<Standing, "backups" | "chained">,
): Map<string, string> {
  const needed = new Map<string, string>();
  if (chained === null) return needed;
  const standing = byUuid(backups);
  for (const one of [...kept, ...chained])
    for (
      let need = standing.get(one.parentUuid ?? "");
      need !== undefined && !needed.has(need.uuid);
      need = standing.get(need.parentUuid ?? "")
    )
      needed.set(need.uuid, one.name);
  return needed;
}

/** The order in which backups are deleted: of streams each before what it builds on, so that none ever lacks that. */
export function deletionOrder(
  going: readonly Backup[],
  { chained }: Pick<Standing, "chained">,
): Backup[] {
  const standing = byUuid(going);
  const depth = new Map(
    going.map((one) => [one.uuid, chained === null ? 0 : chainOf(one, standing).length]),
  );
  return [...going].sort((a, b) => (depth.get(b.uuid) as number) - (depth.get(a.uuid) as number));
}

/** A destination as retention at the source sees it. */
export type Claimant = {
  readonly id: string;
  readonly pin: { readonly uuid: string } | null;
  /** It was given in this run, and could not be read. */
  readonly unread: boolean;
  /** Null unless what it could not get is to be kept for it. */
  readonly unsentPolicy: { readonly policy: Policy | null } | null;
  /** UUIDs of snapshots older than the pin that could not be sent there. */
  readonly failed?: readonly string[] | undefined;
};

/**
 * What retention does at the source. Every known destination's pin stays; while one that has no pin,
 * or one that is gone (a restored record is old), could not be read, everything does.
 */
export function planSource(
  snapshots: readonly Snapshot[],
  policy: Policy | null,
  claimants: readonly Claimant[],
  now: number,
  { adopted = [], full = false }: SourceState = {},
): Decision<Snapshot>[] {
  const extra = new Map<string, string[]>(snapshots.map(({ uuid }) => [uuid, []]));
  for (const { id, pin, unread, unsentPolicy, failed = [] } of claimants) {
    const pinned = snapshots.findIndex(({ uuid }) => uuid === pin?.uuid);
    if (pinned !== -1) extra.get(snapshots[pinned]?.uuid ?? "")?.push(`shared with ${id}`);
    if (unread && pinned === -1)
      for (const reasons of extra.values()) reasons.push(`nothing is known of ${id} yet`);
    if (unsentPolicy === null) continue;
    retain(snapshots, unsentPolicy.policy, now).forEach(
      ({ entry, reasons }, i) =>
        (i > pinned || failed.includes(entry.uuid)) &&
        reasons.length > 0 &&
        extra.get(entry.uuid)?.push(UNSENT + id),
    );
  }
  const decisions = despiteLeaps(retain(snapshots, policy, now), policy, adopted).map(
    ({ entry, reasons }) => ({ entry, reasons: [...reasons, ...(extra.get(entry.uuid) ?? [])] }),
  );
  const unsent = decisions.filter(
    ({ reasons }) => reasons.length > 0 && reasons.every((reason) => reason.startsWith(UNSENT)),
  );
  const lost = new Set(full ? unsent.slice(0, Math.ceil(unsent.length / 2)) : []);
  return decisions.map((decision) =>
    lost.has(decision) ? { ...decision, reasons: [] } : decision,
  );
}

/** What else retention at a source goes by. `adopted`: see despiteLeaps; `full`: there is hardly any space left, so the older half of what is only kept to be sent goes. */
export type SourceState = { readonly adopted?: readonly string[]; readonly full?: boolean };

const UNSENT = "not yet sent to ";
/** How many snapshots are kept only because a destination has not got them yet, by its ID, and the oldest of these. */
export function unsentIn(
  decisions: readonly Decision<Snapshot>[],
): Map<string, { count: number; oldest: string }> {
  const unsent = new Map<string, { count: number; oldest: string }>();
  for (const { entry, reasons } of decisions)
    for (const reason of reasons.length > 0 && reasons.every((one) => one.startsWith(UNSENT))
      ? reasons
      : []) {
      const id = reason.slice(UNSENT.length);
      unsent.set(id, {
        count: (unsent.get(id)?.count ?? 0) + 1,
        oldest: unsent.get(id)?.oldest ?? entry.name,
      });
    }
  return unsent;
}

/** A snapshot in a row of one table: `whole` can be given back, `other` is other data by the row's name. */
export type Cell = { readonly state: "whole" | "incomplete" | "other"; readonly entry: Snapshot };
export type Row = Dated & { readonly moment: number; readonly cells: (Cell | undefined)[] };

/** Lays the same data side by side, whatever holds it: a row for each snapshot, oldest first, a cell for each folder. */
export function align(columns: readonly (Folder | null)[]): Row[] {
  const rows: Row[] = [];
  const [byData, byName] = [new Map<string, Row>(), new Map<string, Row>()];
  for (const [i, column] of columns.entries()) {
    const whole = new Set(column === null ? [] : wholeIn(column));
    for (const entry of column?.snapshots ?? []) {
      const keys = whole.has(entry)
        ? [entry.uuid, ...(entry.receivedUuid === null ? [] : [entry.receivedUuid])]
        : [];
      let row = keys
        .map((key) => byData.get(key))
        .find((same) => same !== undefined && same.cells[i] === undefined);
      const known = row !== undefined;
      row ??= byName.get(entry.name);
      if (row === undefined || row.cells[i] !== undefined)
        rows.push(
          (row = {
            name: entry.name,
            time: entry.time,
            moment: entry.moment,
            cells: columns.map(() => undefined),
          }),
        );
      if (!byName.has(row.name)) byName.set(row.name, row);
      const other = !known && row.cells.some((cell) => cell?.state === "whole");
      row.cells[i] = { state: keys.length === 0 ? "incomplete" : other ? "other" : "whole", entry };
      if (!other) for (const key of keys) byData.set(key, row);
    }
  }
  const rank = new Map(columns[0]?.snapshots.map(({ uuid }, i) => [uuid, i]));
  return arrange(rows, ({ cells }) => rank.get(cells[0]?.entry.uuid ?? ""));
}

/** How a backup gets to where it is restored: from what is there already, or as a stream on top of what both sides have. */
export type RestorePlan = { readonly present: Subvolume | null } & Pick<Transfer, "parent" | "why">;

/** The streams of a chain that have to be received where some subvolumes are: those after the last that is there. The chosen one always is. */
export function planPieces(chain: readonly Stream[], there: readonly Subvolume[]): Stream[] {
  const find = dataFinder([
    ...there,
    ...there
      .filter(({ receivedUuid }) => receivedUuid === null)
      .map((one) => ({ ...one, receivedUuid: one.uuid })),
  ]);
  return chain.slice(chain.slice(0, -1).findLastIndex((stream) => find(stream) !== undefined) + 1);
}

/** `whole`: what its location has, oldest first; `there`: the read-only subvolumes that a receive could build on. */
export function planRestore(
  chosen: Snapshot,
  whole: readonly Snapshot[],
  there: readonly Subvolume[],
  fitness = ANY,
): RestorePlan {
  const received = chosen.receivedUuid ?? chosen.uuid;
  const present = there.find(({ receivedUuid }) => receivedUuid === received) ?? null;
  const find = dataFinder(there);
  const shared = (snapshot: Snapshot) => find(snapshot) !== undefined;
  // Up to itself: where its data is there under another UUID, the stream is a few bytes.
  const behind = whole.findIndex(({ uuid }) => uuid === chosen.uuid) + 1 || whole.length;
  return {
    present,
    ...nearestFit(
      chosen,
      whole.slice(0, behind).filter(shared),
      whole.slice(behind).filter(shared),
      fitness,
    ),
  };
}

/** What interrupted restores to a name in a folder left: directories, each with the subvolumes in it, innermost first. */
export function leftoversOf(
  name: string,
  { top, entries, subvolumes }: Pick<Folder, "top" | "entries" | "subvolumes">,
): Map<string, string[]> {
  const ours = [...entries].filter(
    (entry) =>
      entry.startsWith(`${name}.restoring-`) && parseName(entry, `${name}.restoring-`) !== null,
  );
  return new Map(
    ours.map((entry) => {
      const above = `${join(top, entry)}/`;
      const paths = subvolumes
        .map(({ path }) => `/${path}`)
        .filter((path) => path.startsWith(above))
        .map((path) => path.slice(above.length));
      const made = (path: string) =>
        path === "tree" ||
        ((path.startsWith("tree/") || !path.includes("/")) && prefixOf(basename(path)) !== null);
      return [
        entry,
        paths
          .filter(made)
          .map((path) => `./${path}`)
          .sort((a, b) => b.split("/").length - a.split("/").length),
      ];
    }),
  );
}

/**
 * What a restored snapshot folder's record says of destinations, after what the restored one said when it was
 * taken: only what `stands` is a pin; the place that `name` came from shares it.
 */
export function restoredDestinations(
  recorded: readonly KnownDestination[],
  stands: (uuid: string) => boolean,
  came: { readonly id: string; readonly filesystem: string | null; readonly pin: Memory } | null,
): KnownDestination[] {
  // Known by another path: the one folder on that disk, by the same name.
  const alike = recorded.filter(
    ({ filesystem }) => filesystem !== null && filesystem === came?.filesystem,
  );
  const old = recorded.map((known) => {
    const from =
      came !== null &&
      (known.location === came.id ||
        (alike.length === 1 &&
          alike[0] === known &&
          basename(known.location) === basename(came.id)));
    return {
      ...known,
      pin: from ? came.pin : known.pin !== null && stands(known.pin.uuid) ? known.pin : null,
    };
  });
  const listed = came === null || old.some(({ pin }) => pin === came.pin);
  return listed
    ? old
    : [...old, { location: came.id, filesystem: came.filesystem, pin: came.pin, last: null }];
}

/** What to do where TARGET is a mount point, whose name cannot be given to something else. */
export function mountAdvice(
  words: readonly string[],
  path: string,
  { root, device }: Mount,
): string {
  const restore = words.map(quote).join(" ");
  const again = path === "/" ? "reboot" : `umount ${quote(path)} && mount ${quote(path)}`;
  const top = `mount -o subvolid=5 ${quote(device)} /mnt`;
  if (root === "/")
    return `${path} is a mount point, of the top level of ${device}, which cannot be replaced. Restore beside it, and mount that instead:
  ${top}
  btrfs-backup restore ${restore} /mnt/restored
  btrfs subvolume set-default /mnt/restored   # or subvol=restored in /etc/fstab
  ${again}`;
  return `${path} is a mount point, of the subvolume ${root.slice(1)} of ${device}. Replace that where the top level is mounted:
  ${top}
  btrfs-backup restore --replace ${restore} ${quote(`/mnt${root}`)}
  ${again}
If /etc/fstab has subvolid= for it, write subvol=${root.slice(1)} instead; if it has neither, btrfs subvolume set-default ${quote(`/mnt${root}`)}`;
}

/**
 * What may go now to make room for the first of the transfers to come: what the policy drops once
 * it is there, but never the newest backup of now, the pin, or a parent of one to come.
 */
export function planRoom(
  snapshots: readonly Snapshot[],
  { backups, copied, chained }: Kept,
  coming: readonly Transfer[],
  policy: Policy | null,
  now: number,
  adopted: readonly string[] = [],
): Backup[] {
  const find = dataFinder(backups);
  const then = [...backups, ...coming.slice(0, 1).map(arrived)];
  const later = new Set(
    planDestination(snapshots, { backups: then, copied, chained }, policy, now, adopted)
      .filter(({ reasons }) => reasons.length === 0)
      .map(({ entry }) => entry),
  );
  const parents = coming.map(({ parent }) => parent && find(parent));
  const [newest, pin] = [
    planDestination(snapshots, { backups, copied, chained }, policy, now).at(-1)?.entry,
    newestShared(snapshots, backups),
  ];
  const stays = [...parents, newest, pin && find(pin)].filter(
    (backup) => backup !== null && backup !== undefined,
  );
  const needed = neededBy(stays, { backups, chained });
  return backups.filter(
    (backup) => later.has(backup) && !stays.includes(backup) && !needed.has(backup.uuid),
  );
}

/** Whether a source may use a folder for a chain; `strangers` are the backups there that are not its own. */
export type Claim =
  | { readonly accepted: true; readonly strangers: readonly string[] }
  | { readonly accepted: false; readonly why: string };

/**
 * One chain, one owner. `shared` tells the folder's snapshots that hold the claiming source's data;
 * of the others, the ancestors of those are its own as well (each was received on top of its parent).
 */
export function claim(
  identity: Identity,
  chain: ChainRecord,
  standing: readonly Snapshot[],
  shared: readonly Snapshot[],
  adopt: boolean,
): Claim {
  const { owner, strangers = [] } = chain;
  const foreign = new Set(strangers);
  const samePlace = owner?.host === identity.host && owner.path === identity.path;
  if (owner?.uuid === identity.uuid) {
    // A machine that was cloned has the original's subvolume UUIDs, but not what the original has sent since.
    const newest = standing.findLast(({ uuid }) => !foreign.has(uuid));
    if (samePlace || newest === undefined || shared.some(({ uuid }) => uuid === newest.uuid))
      return { accepted: true, strangers };
    if (!adopt)
      return {
        accepted: false,
        why: `the backups there were made on ${owner.host}:${owner.path}, and the newest, ${newest.name}, is unknown to ${identity.host}:${identity.path}, which has the same subvolume UUID (${identity.uuid}): is one a clone of the other? Use a prefix (-p) or another folder; --adopt goes on with them`,
      };
  }
  if (standing.length === 0 || (samePlace && shared.length > 0))
    return { accepted: true, strangers };
  if (!adopt && (owner !== undefined || shared.length === 0)) {
    const theirs =
      owner === undefined
        ? "an unknown source: nothing there has been received from this one"
        : `${owner.host}:${owner.path} (subvolume ${owner.uuid})`;
    return {
      accepted: false,
      why: `the backups there belong to ${theirs}; this source is ${identity.host}:${identity.path} (subvolume ${identity.uuid}). Use a prefix (-p) or another folder; --adopt takes it over`,
    };
  }
  const byUuid = new Map(standing.map((backup) => [backup.uuid, backup]));
  const own = new Set<string>();
  for (const start of shared)
    for (
      let b: Snapshot | undefined = start;
      b !== undefined && !own.has(b.uuid);
      b = byUuid.get(b.parentUuid ?? "")
    )
      own.add(b.uuid);
  return {
    accepted: true,
    strangers: [...new Set([...strangers, ...standing.map(({ uuid }) => uuid)])].filter(
      (uuid) => !own.has(uuid),
    ),
  };
}

/** The lineages whose streams in a store are a source's own: its first, and those of streams that it sent, or shares data with (it was restored, or rolled back). */
export function lineagesOf(
  streams: readonly Stream[],
  owner: Owner,
  snapshots: readonly Snapshot[],
): Set<string> {
  const shared = dataFinder(snapshots);
  const own = streams.filter(
    (stream) => stream.owner.uuid === owner.uuid || shared(stream) !== undefined,
  );
  return new Set([owner.lineage, ...own.map((stream) => stream.owner.lineage)]);
}

/** A chain's record once `owner` has it. */
function ownedBy(
  owner: Identity,
  { strangers: _, ...chain }: ChainRecord,
  strangers: readonly string[],
): ChainRecord {
  return { ...chain, owner, ...(strangers.length > 0 ? { strangers } : {}) };
}

// ── 6. Transfer ──────────────────────────────────────────────────────────────────────────

function placeIn(places: Report["places"], id: string | null): PlaceMetrics {
  const place = places.get(id) ?? {
    sent: 0,
    bytes: 0,
    seconds: 0,
    deleted: 0,
    errors: 0,
    kept: null,
    last: null,
  };
  places.set(id, place);
  return place;
}

/** What the system is short of, where an error says that; null for any other. */
function lackOf(error: unknown): string | null {
  const { code, path = "" } = error as NodeJS.ErrnoException;
  if (code === "EMFILE" || code === "ENFILE") return "too many files are open: see ulimit -n";
  if (code === "EAGAIN" || code === "ENOMEM") return NO_PROCESS;
  if ((code === "ENOSPC" || code === "EDQUOT") && path.includes("btrfs-backup."))
    return `there is no space left for ${path}`;
  return null;
}

function newReport(json: boolean, dryRun: boolean): Report {
  const tally: Report["tally"] = {};
  const places: Report["places"] = new Map();
  const event: Report["event"] = (name, fields) => {
    tally[name] = (tally[name] ?? 0) + 1;
    if (name === "transfer") {
      const place = placeIn(places, fields["destination"] as string);
      place.sent++;
      place.bytes += (fields["bytes"] as number | null) ?? 0;
    }
    if (json)
      process.stdout.write(
        `${JSON.stringify({ event: name, ...fields, ...(dryRun ? { dry_run: true } : {}) })}\n`,
      );
  };
  const report: Report = {
    failed: false,
    tally,
    places,
    event,
    warning(message) {
      log.warn(message);
      event("warning", { message });
    },
    error(destination, error) {
      if (error instanceof Interrupted) throw error;
      if (error instanceof AlreadyTold) return;
      // Anything but our own errors is a mistake in this program, and its stack tells where.
      const message =
        error instanceof Failure || error instanceof Busy
          ? error.message
          : (lackOf(error) ?? String((error as Error)?.stack ?? error));
      report.failed = true;
      placeIn(places, destination).errors++;
      log.error(
        destination === null || message.startsWith(destination)
          ? message
          : `${destination}: ${message}`,
      );
      event("error", { destination, message });
    },
  };
  return report;
}

/** What is shown of transfers; `sizes`: bytes of a full stream, by snapshot UUID, where quotas tell them. */
type Display = {
  readonly progress: boolean;
  readonly btrfsDebug: boolean;
  readonly sizes: Map<string, number>;
};

/** Whether there is a terminal to draw a bar on. */
function canShowProgress(): boolean {
  if (!process.stderr.isTTY) log.debug("no progress is shown: stderr is no terminal");
  return process.stderr.isTTY;
}

/** What options ask to show. */
const displayOf = ({ progress, btrfsDebug }: Omit<Display, "sizes">): Display => ({
  progress: progress && canShowProgress(),
  btrfsDebug,
  sizes: new Map(),
});

/** One line about a stream: `bytes` of `size`, where that is known, after so many seconds. */
export function progressLine(
  name: string,
  bytes: number,
  size: number | undefined,
  seconds: number,
  columns: number,
): string {
  const what = visible(name);
  const rate = bytes / Math.max(seconds, 1);
  const clock = (s: number) =>
    `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(Math.floor(s) % 60)}`;
  const done = Math.min(1, bytes / (size ?? Infinity));
  const bar =
    size === undefined
      ? ""
      : ` ${`${"=".repeat(Math.floor(done * 19))}>`.padEnd(20)} ${String(Math.floor(done * 100)).padStart(3)}% ${clock(rate === 0 ? 0 : Math.max(0, size - bytes) / rate)} left`;
  const figures = ` ${inBytes(bytes).padStart(7)} ${inBytes(Math.floor(rate)).padStart(7)}/s ${clock(seconds)}${bar}`;
  const room = columns - 1 - figures.length;
  return `${what.length > room ? `${what.slice(0, Math.max(0, room - 1))}…` : what.padEnd(Math.min(room, 40))}${figures}`;
}

/** The stage that counts bytes for a line about a stream, up to `size` of them, and slows down; none if nothing of this is asked for. */
function meter(
  what: string,
  { progress }: Pick<Display, "progress">,
  rate: number | null,
  size?: number,
): Stage[] {
  const slowed = rate === null ? {} : { rate };
  if (!progress) return rate === null ? [] : [relaying(slowed)];
  const [stream, began] = [{}, Date.now()];
  const line = (bytes: number) =>
    progressLine(what, bytes, size, (Date.now() - began) / 1000, process.stderr.columns || 80);
  return [relaying(slowed, (bytes) => terminal.show(stream, bytes === null ? null : line(bytes)))];
}

/** What a destination got of one snapshot. */
type Sent = { readonly bytes: number | null; readonly seconds: number };

/** Where a stream goes: a destination, or what stands for one. */
type Receiver = Pick<Destination, "id" | "form" | "receive" | "discard" | "tidy">;

/** Sends one snapshot to one destination, which is as before if it fails. Errors: those of `pipeline`. */
async function transferTo(
  receiver: Receiver,
  source: Folder,
  transfer: Transfer,
  display: Display,
): Promise<Sent> {
  const [result] = await transferToAll([receiver], source, transfer, display);
  if (result?.status === "fulfilled") return result.value;
  throw result?.reason;
}

/** Sends one snapshot to destinations that take the same stream: it is made once. Where it fails, all is as before; tells each one's outcome. */
async function transferToAll(
  receivers: readonly Receiver[],
  source: Folder,
  transfer: Transfer,
  display: Display,
): Promise<PromiseSettledResult<Sent>[]> {
  const began = Date.now();
  const ready = await Promise.allSettled(
    receivers.map((receiver) => receiver.receive(source, transfer)),
  );
  const incoming = new Map(
    receivers.flatMap((receiver, i): [Receiver, Incoming][] =>
      ready[i]?.status === "fulfilled" ? [[receiver, ready[i].value]] : [],
    ),
  );
  const flowing = incoming.size === 0 ? [] : await stream([...incoming], source, transfer, display);
  const outcomes = new Map([...incoming.keys()].map((receiver, i) => [receiver, flowing[i]]));
  return Promise.allSettled(
    receivers.map(async (receiver, i): Promise<Sent> => {
      if (ready[i]?.status === "rejected") throw ready[i].reason;
      const { finish } = incoming.get(receiver) as Incoming;
      try {
        const outcome = outcomes.get(receiver) as PromiseSettledResult<Flown>;
        if (outcome.status === "rejected") throw outcome.reason;
        const { bytes, summed } = outcome.value;
        return {
          bytes: finish === undefined ? bytes : await finish(summed as Summed),
          seconds: (Date.now() - began) / 1000,
        };
      } catch (error) {
        return again(receiver, error as Error, source, transfer, display);
      }
    }),
  );
}

/** What follows a broken transfer: it is cleared away, and made once more if it can end otherwise. Errors: the one that broke it. */
async function again(
  receiver: Receiver,
  error: Error,
  source: Folder,
  transfer: Transfer,
  display: Display,
): Promise<Sent> {
  const { name } = transfer.snapshot;
  if (error instanceof OtherStream) {
    log.info(`${name}: its stream has changed since the transfer broke, which begins anew`);
    await receiver.tidy();
    return transferTo(receiver, source, transfer, display);
  }
  if (error instanceof Stuck) throw error;
  // What stood in the way of the name is not what this transfer left.
  if (!/File exists/.test(error.message))
    await whileCleaning(() => receiver.discard(name)).catch((problem: Error) =>
      log.warn(`${problem.message} (the next run will)`),
    );
  checkInterruption();
  const form = receiver.form(source);
  if (form?.chosen && /encoded.write|--protocol 1/i.test(error.message)) {
    log.info(`${name}: ${error.message}; once more with protocol 1`);
    return transferTo(
      { ...receiver, form: () => ({ ...form, protocol: "1", chosen: false }) },
      source,
      transfer,
      display,
    );
  }
  throw error;
}

/** Makes the stream, and lets it flow to all who take it. */
async function stream(
  incoming: readonly (readonly [Receiver, Incoming])[],
  source: Folder,
  { snapshot, parent }: Transfer,
  display: Display,
): Promise<PromiseSettledResult<Flown>[]> {
  const [[first, { kept, stages, environment }]] = incoming as [readonly [Receiver, Incoming]];
  const { level, protocol, rate } = kept ?? (first.form(source) as Form);
  const before =
    kept === undefined || kept.bytes === 0
      ? { skip: "", sum: "" }
      : { skip: String(kept.bytes), sum: kept.sum };
  const hexadecimal = (one: Snapshot | null) =>
    one === null || source.alone ? "" : dataOf(one).replaceAll("-", "");
  const asked = { uuid: hexadecimal(snapshot), clone: hexadecimal(parent) };
  const sent = {
    level,
    protocol: protocol ?? "",
    holder: holderOf(source),
    snapshot: snapshot.name,
    parent: parent?.name ?? "",
    ...before,
    ...asked,
  };
  const given = { flag: display.btrfsDebug ? "-vv" : "-q", ...at(source), ...sent };
  const send = staged(`btrfs send${level === "" ? "" : " or zstd"}`, source.host, SEND, given, {
    sends: true,
    shown: display.btrfsDebug,
  });
  const others = incoming.length === 1 ? "" : ` and ${incoming.length - 1} more`;
  const metered = meter(
    `${snapshot.name} to ${first.id}${others}`,
    display,
    rate,
    parent === null && level === "" ? display.sizes.get(snapshot.uuid) : undefined,
  );
  // How many bytes a compressed stream has is known only behind the host that compresses it.
  const between =
    level === "" || incoming.every(([, { finish }]) => finish)
      ? metered
      : [relaying({}), ...metered];
  if (incoming.length === 1)
    return Promise.allSettled([pipeline([send, ...between, ...stages], environment)]);
  return fanOut(
    [send, ...between],
    incoming.map(([, one]) => one),
  );
}

/**
 * Runs the stages of one stream, and what follows of each who takes it as a pipeline of its own, so that one that fails, or is stuck, drops
 * out. Where the stream itself fails, all are killed before their input closes.
 */
async function fanOut(
  stages: readonly Stage[],
  takers: readonly Incoming[],
): Promise<PromiseSettledResult<Flown>[]> {
  const directory = mkdtempSync(join(runtimeDirectory(), "f"));
  const pipes = takers.map((_, i) => `${directory}/${i}`);
  const { error } = spawnSync("mkfifo", pipes);
  if (error !== undefined) throw error;
  let isFlowing = true;
  const blocked = (): readonly number[] => (isFlowing ? (trunk?.blocked() ?? []) : []);
  const branches: Flowing[] = [];
  let trunk: Flowing | null = null;
  try {
    for (const [i, { stages, environment }] of takers.entries()) {
      // Who waits for what another one keeps from all does nothing, and is not stuck.
      const waits = () => isFlowing && !blocked().includes(i);
      branches.push(flow(stages, environment ?? {}, { input: pipes[i] as string, waits }));
    }
    const to = branches.map(({ group }, i) => ({ path: pipes[i] as string, group }));
    trunk = flow(
      [...stages, relaying({ to })],
      {},
      { feeds: branches.map(({ group }) => group), waits: () => blocked().length > 0 },
    );
  } catch (error) {
    for (const { kill, ended } of branches) {
      kill();
      await ended.catch(() => {});
    }
    rmSync(directory, { recursive: true, force: true });
    throw error;
  }
  // As long as we hold them open, nobody takes the end of a relay that was killed for the end of the stream.
  const held = Promise.all(branches.map(({ ended }, i) => heldOpen(pipes[i] as string, ended)));
  // Without its pipe, an output is given up, also while a dead disk keeps its reader.
  for (const [i, { ended }] of branches.entries())
    ended.catch((error) => error instanceof Stuck && rmSync(pipes[i] as string, { force: true }));
  const [stem] = await Promise.allSettled([trunk.ended]);
  isFlowing = false;
  if (stem.status === "rejected") for (const { kill } of branches) kill();
  for (const descriptor of await held) if (descriptor !== null) closeSync(descriptor);
  const ends = await Promise.allSettled(branches.map(({ ended }) => ended));
  rmSync(directory, { recursive: true, force: true });
  return ends.map((end) => {
    if (stem.status === "rejected" && (end.status === "fulfilled" || end.reason instanceof Killed))
      return { status: "rejected" as const, reason: stem.reason as unknown };
    if (end.status === "rejected") return end;
    const { bytes } = (stem as PromiseFulfilledResult<Flown>).value;
    return { status: "fulfilled", value: { ...end.value, bytes } };
  });
}

/** Opens a FIFO for writing as soon as somebody reads it; null if its reader ends before. */
async function heldOpen(pipe: string, reader: Promise<unknown>): Promise<number | null> {
  let over = false;
  reader.catch(() => {}).finally(() => (over = true));
  for (; !over; await new Promise((later) => setTimeout(later, 5)))
    try {
      return openSync(pipe, constants.O_WRONLY | constants.O_NONBLOCK);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENXIO") throw error;
    }
  return null;
}

/** Whether a process group has a process yet. */
function isRunning(group: number): boolean {
  try {
    return process.kill(-group, 0);
  } catch {
    return false;
  }
}

// ── the relay ──

/** What the relay does with the bytes that pass it. */
type Relay = {
  /** Tells their SHA-256. */
  readonly sum?: boolean;
  /** At most so many bytes a second. */
  readonly rate?: number;
  /** The file that gets what it tells at its end; with ".now" behind its name, twice a second, how many bytes have passed, and the numbers of outputs that take nothing. */
  readonly tell?: string;
  /** They must be this stream: see streamCheck. */
  readonly check?: Expected;
  /**
   * They come with a guarded key: a send stream, or any bytes; at most so many, which `refusal` says. Guard is asked: see Said. `state`: the file
   * that says whether the relay waits for its input (r), or has something to pass on (w).
   */
  readonly guarded?: {
    readonly stream: boolean;
    readonly most: number | null;
    readonly refusal: string;
    readonly state: string;
  };
  /** They go nowhere. */
  readonly drop?: boolean;
  /** Where they go instead of standard output: FIFOs, each with the process group that reads it. One that is removed is given up. */
  readonly to?: readonly { readonly path: string; readonly group: number }[];
};

/** The stream that is expected: what it makes, and on top of what; `alone`: no fence keeps it in. Empty UUIDs are not known. */
type Expected = {
  readonly name: string;
  readonly uuid: string;
  readonly parent: string | null;
  readonly alone: boolean;
};

/**
 * What the processes of a guarded stream say on descriptor 3, a line each. What the stream begins with (name, UUID, and its parent's, null in
 * full), and that it is whole with so many bytes, are questions, which guard answers with a line on descriptor 4, or not at all. `unpacked`: zstd's exit status.
 */
type Said =
  | { readonly unpacked: number }
  | { readonly begins: readonly [string, string, string | null] }
  | { readonly whole: number }
  | { readonly refused: string };

/** What the relay tells at its end. */
type Passed = { readonly bytes: number; readonly sum: string | null };

/**
 * Passes standard input on, and tells what has passed. A process of its own, which reads and writes with blocking calls,
 * so that no byte waits for anything else, and which any signal ends at once: with a handler, it would not in such a call. Where it
 * fails, whoever started it kills those who read from it while its standard output is still open; those behind FIFOs it kills itself.
 */
function relay(given: Relay): never {
  try {
    const passed = passOn(given);
    if (given.tell !== undefined) writeFileSync(given.tell, JSON.stringify(passed));
    process.exit(0);
  } catch (error) {
    for (const { group } of given.to ?? []) sendSignal(-group, "SIGKILL");
    try {
      if (given.guarded !== undefined) {
        // Who takes it has ended before, and tells why itself.
        if ((error as NodeJS.ErrnoException).code === "EPIPE") process.exit(0);
        if (error instanceof Refused) {
          say({ refused: error.message });
          process.exit(1);
        }
      }
      writeSync(
        2,
        `${error instanceof Refused ? `the stream is refused: ${error.message} (--trust-stream receives it as it is)` : (error as Error).message}\n`,
      );
    } catch {
      // nobody listens
    }
    process.exit(1);
  }
}

function say(what: Said): void {
  const line = Buffer.from(`${JSON.stringify(what)}\n`);
  writeAll(3, line, line.length);
}

/** Asks guard, and waits for its answer. Errors: Refused without one. */
function askGuard(question: Said): void {
  say(question);
  if (readSome(4, Buffer.alloc(1), 0, 1) === 0) refuse("guard does not allow it");
}

/** The check of a stream that the relay was asked for, if any. */
function checkFor({ check, guarded }: Relay): Checking | null {
  if (guarded?.stream) return streamCheck((...begins) => askGuard({ begins }));
  return check === undefined ? null : streamCheck(expecting(check), check.alone);
}

function passOn(given: Relay): Passed {
  const { sum, rate, tell, guarded, drop, to } = given;
  const limit = guarded?.most ?? Infinity;
  const BLOCK = 2 ** 20;
  const room = Buffer.allocUnsafe(2 * BLOCK);
  const hash = sum ? createHash("sha256") : null;
  const checked = checkFor(given);
  const state = guarded === undefined ? null : openSync(guarded.state, "w");
  const mark = (letter: "r" | "w") => state !== null && writeSync(state, letter, 0);
  const tellBytes = (waiting: readonly number[] = []) => {
    told = performance.now();
    if (tell !== undefined) writeFileSync(`${tell}.now`, [bytes, ...waiting].join(" "));
  };
  const outputs =
    to === undefined
      ? null
      : openOutputs(to, (waiting) => performance.now() - told > 500 && tellBytes(waiting));
  widen([0, ...(outputs?.descriptors ?? [1])]);
  const most = rate === undefined ? BLOCK : Math.min(BLOCK, Math.max(4096, Math.ceil(rate / 10)));
  const began = performance.now();
  let [have, bytes, told] = [0, 0, began];
  const send = (end: number) => {
    let hadToWait = false;
    if (end === 0) return;
    hash?.update(room.subarray(0, end));
    if (outputs !== null) hadToWait = outputs.write(room, end);
    else if (!drop) writeAll(1, room, end);
    bytes += end;
    if (hadToWait) tellBytes(); // nobody does any more
    if (rate !== undefined) pause((1000 * bytes) / rate - (performance.now() - began));
    if (performance.now() - told > 500) tellBytes();
  };
  for (let n; mark("r"), (n = readSome(0, room, have, most)) > 0;) {
    mark("w");
    have += n;
    if (bytes + have > limit) refuse(guarded?.refusal as string);
    const end = checked === null ? have : checked.pass(room, 0, have);
    send(end);
    room.copyWithin(0, end, have);
    have -= end;
  }
  mark("w");
  checked?.finish();
  if (guarded !== undefined) askGuard({ whole: bytes + have });
  send(have);
  tellBytes();
  return { bytes, sum: hash?.digest("hex") ?? null };
}

/**
 * Gives pipes room for 1 MiB, of which each has 64 KiB by itself: storing a stream takes a quarter less time so. 1031 is F_SETPIPE_SZ of
 * fcntl(2). Only under Bun, which the executable is made of; elsewhere, and what is no pipe, stays as it is.
 */
function widen(descriptors: readonly number[]): void {
  type Library = {
    readonly symbols: {
      readonly fcntl: (descriptor: number, command: number, value: number) => number;
    };
  };
  const { Bun: bun } = globalThis as {
    Bun?: { readonly FFI?: { readonly dlopen: (name: string, symbols: object) => Library } };
  };
  try {
    const library = bun?.FFI?.dlopen("libc.so.6", {
      fcntl: { args: ["int", "int", "int"], returns: "int" },
    });
    for (const descriptor of descriptors) library?.symbols.fcntl(descriptor, 1031, 2 ** 20);
  } catch {
    // another C library
  }
}

/** Sleeps for so many ms; not at all for none. */
function pause(ms: number): void {
  if (ms > 0) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
}

function isBusy(error: unknown): boolean {
  return (error as NodeJS.ErrnoException).code === "EAGAIN";
}

/** Reads what there is, at most so much; 0 at the end. */
function readSome(descriptor: number, room: Buffer, at: number, most: number): number {
  for (;;)
    try {
      return readSync(descriptor, room, at, Math.min(most, room.length - at), null);
    } catch (error) {
      if (!isBusy(error)) throw error;
      pause(1); // somebody else set it so that it does not block
    }
}

function writeAll(descriptor: number, bytes: Buffer, end: number): void {
  for (let at = 0; at < end;)
    try {
      at += writeSync(descriptor, bytes, at, end - at);
    } catch (error) {
      if (!isBusy(error)) throw error;
      pause(1);
    }
}

/** Several outputs, each fed as it takes: `tell` gets those that all wait for, again and again, and `write` returns whether it did. Who reads no more drops out, and tells why itself; so does whose pipe was removed. */
function openOutputs(
  to: NonNullable<Relay["to"]>,
  tell: (waiting: readonly number[]) => void,
): { write: (bytes: Buffer, end: number) => boolean; readonly descriptors: readonly number[] } {
  type Output = { readonly number: number; readonly path: string; descriptor: number; at: number };
  const most = process.versions["deno"] === undefined ? Infinity : 4096;
  const opened = performance.now();
  let open = to.map(({ path, group }, number): Output => ({
    number,
    path,
    descriptor: openRead(path, group),
    at: 0,
  }));
  function openRead(path: string, group: number): number {
    for (; ; pause(1))
      try {
        return openSync(path, constants.O_WRONLY | constants.O_NONBLOCK);
      } catch (error) {
        // Its reader has not begun, or will not.
        if ((error as NodeJS.ErrnoException).code !== "ENXIO") throw error;
        if (!isRunning(group) || performance.now() - opened > 60e3) return -1;
      }
  }
  const close = (output: Output) => {
    if (output.descriptor !== -1) closeSync(output.descriptor);
    output.descriptor = -1;
  };
  /** Whether an output took something. Deno tells nothing of a part that was taken: there, as much as is taken whole or not at all, PIPE_BUF of pipe(7). */
  const feed = (output: Output, bytes: Buffer, end: number): boolean => {
    try {
      output.at += writeSync(output.descriptor, bytes, output.at, Math.min(end - output.at, most));
      return true;
    } catch (error) {
      if (!isBusy(error)) close(output);
      return false;
    }
  };
  return {
    descriptors: open.map(({ descriptor }) => descriptor),
    write(bytes, end) {
      let hadToWait = false;
      for (const output of open) output.at = 0;
      for (let wait = 0.05; ;) {
        const waiting = open.filter(({ descriptor, at }) => descriptor !== -1 && at < end);
        if (waiting.length === 0) break;
        const taken = waiting.map((output) => feed(output, bytes, end)).includes(true);
        wait = taken ? 0.05 : Math.min(100, 1.5 * wait);
        if (taken) continue;
        pause(wait);
        tell(waiting.map(({ number }) => number));
        hadToWait = true;
        if (wait === 100) for (const output of waiting) if (!existsSync(output.path)) close(output);
      }
      open = open.filter(({ descriptor }) => descriptor !== -1);
      if (open.length === 0) throw new Error("nobody takes it any more");
      return hadToWait;
    },
  };
}

// ── 7. Commands ──────────────────────────────────────────────────────────────────────────

// ── run: a snapshot, sent to every destination, and both sides pruned ──

export type RunOptions = ReturnType<typeof runOptions>;

/** A destination of a run; `recorded`: only --locked-dests asks for it. */
export type Wanted = {
  readonly location: Location;
  readonly optional: boolean;
  readonly recorded?: true;
  readonly policy: Policy | null;
  readonly sending: Sending;
};

/** Takes a snapshot, sends every destination what it lacks, and keeps what should be kept. */
export async function run(o: RunOptions, report: Report): Promise<void> {
  checkPlaces(o);
  let name: string | null = null;
  await persistently(o, report, async (attempt, attemptReport) => {
    const open = (locked: () => void) => openFinished(attempt, locked);
    const snapshot = attempt.snapshot && name === null;
    name = (await backUp(open, { ...attempt, snapshot }, attemptReport)) ?? name;
  });
  concludeRun(o, report, name);
  if (o.metrics !== null && !o.dryRun)
    await writeMetrics(o.metrics, metricsOf(o.source.id, report.places, Date.now()));
}

/** Refuses a destination in or above the snapshot folder by name alone, before any is opened. */
function checkPlaces(o: Pick<RunOptions, "source" | "snapshotFolder" | "destinations">): void {
  const folder = resolve(o.source.path, o.snapshotFolder);
  const host = JSON.stringify(o.source.host);
  for (const { location } of o.destinations)
    if (
      (location.kind === "folder" || location.kind === "raw") &&
      JSON.stringify(location.host) === host &&
      nested(location.path, folder)
    )
      throw nestedError(location.id);
}

const nested = (a: string, b: string) => isWithin(a, b) || isWithin(b, a);
const nestedError = (id: string) =>
  new UsageError(`${id} is the snapshot folder, or inside or above it`);

/** Attempts something, and again after a lost connection, as often as --retries says. */
async function persistently(
  o: RunOptions,
  report: Report,
  attempt: (o: RunOptions, report: Report) => Promise<void>,
): Promise<void> {
  const known = new Set<string>();
  for (let left = o.retries; ; left--) {
    let isLost = false;
    const tell: Report["error"] = (destination, error) => {
      const { message } = error as Error;
      const line = `${destination ?? ""} ${message}`;
      if (error instanceof Unreachable && left > 0) {
        isLost = true;
        report.warning(`${message}; ${left === 1 ? "one more try" : `${left} more tries`}`);
      } else if (!known.has(line)) report.error(destination, error);
      known.add(line);
    };
    // The other host frees what the lost connection had locked after four beats of silence.
    const { beat } = hostOf(null, o.hosts);
    const wait = left === o.retries ? o.wait : Math.max(o.wait, 5 * beat);
    await attempt({ ...o, wait }, { ...report, error: tell }).catch((problem: Error) => {
      if (!(problem instanceof Unreachable) || left === 0) throw problem;
      tell(null, problem);
    });
    if (!isLost) return;
    await new Promise<void>((over) => {
      running.add(over);
      setTimeout(() => (running.delete(over), over()), (beat / 3) * 1000);
    });
    checkInterruption();
  }
}

/**
 * Sends every destination what it lacks of a source, and keeps on both sides what should be kept.
 * Returns the name of the snapshot that it took.
 */
async function backUp(
  open: (locked: () => void) => Promise<Source>,
  o: RunOptions,
  report: Report,
): Promise<string | null> {
  let ahead = new Map<string, Ahead>();
  const opening = open(() => ahead.forEach(({ go }) => go()));
  if (o.transfer || !o.removeLocks) ahead = beginOpening(o);
  stamp(new Date()); // the first local time takes long, since zones are loaded for it: meanwhile
  try {
    return await backUpOpened(newSession(await opening, ahead, o, report));
  } finally {
    await whileCleaning(() => allOf([...ahead.values()].map(({ drop }) => drop())));
  }
}

/** Backs up an opened source, and closes it and its destinations. */
async function backUpOpened(session: Session): Promise<string | null> {
  const { o, report, source, known, wanted } = session;
  lookAtPins(session);
  let openings: Openings = [];
  let all: readonly Served[] = [];
  let taken: Snapshot | null = null;
  const began = Date.now();
  try {
    warnOfSource(session);
    if (o.transfer || !o.removeLocks) openings = openAll(session);
    const opened = await openedAtOnce(openings);
    for (const { name, readonly } of source.snapshots)
      if (!readonly)
        report.warning(
          `${source.path}/${name} is writable: it is not sent, not counted and not deleted`,
        );
    if (o.snapshot) taken = await takeSnapshot(session, opened);
    all = await openedInTime(session, openings, taken);
    if (taken !== null) {
      const first = taken;
      taken = await withFreeName(session, first, all).catch(
        (error) => (report.error(null, error), first),
      );
      session.snapshots.push(taken);
      report.event("snapshot", { name: taken.name, path: join(source.path, taken.name) });
    }
    if (o.adoptClock)
      session.leaps = leapNames(
        [session.snapshots, ...all.map(({ standing }) => standing.backups)],
        session.leaps,
      );
    await serve(all, session);
    await pruneAll(all, session);
  } finally {
    await Promise.allSettled(all.map(({ pruning }) => pruning));
    // The source is closed last: whoever locks it finds the others free.
    const closing = () => allOf(openings.map(({ destination }) => closed(destination)));
    await whileCleaning(() => closing().finally(source.close));
  }
  for (const id of wanted.keys()) placeIn(report.places, id).last = known.get(id)?.last ?? null;
  placeIn(report.places, null).seconds += (Date.now() - began) / 1000;
  return taken?.name ?? null;
}

/** One attempt of a run: all that its steps share. */
type Session = ReturnType<typeof newSession>;

function newSession(source: Source, ahead: Map<string, Ahead>, o: RunOptions, report: Report) {
  const known = new Map(knownDestinations(source).map((one) => [one.location, one]));
  const wanted = wantedIn(source, known, o, report);
  // Without its pin all is sent again, and still to the right disk.
  for (const id of o.removeLocks ? wanted.keys() : []) {
    const one = known.get(id);
    if (o.transfer && one !== undefined) known.set(id, { ...one, pin: null });
    else known.delete(id);
  }
  return {
    o,
    report,
    source,
    ahead,
    wanted,
    /** The destinations that the source's record knows, or will. */
    known,
    written: JSON.stringify(source.chain),
    saving: Promise.resolve() as Promise<unknown>,
    isTold: false, // that they cannot be written down
    inquiry: inquiryInto(source),
    display: displayOf(o),
    /** Lets so many streams flow at a time. */
    jobs: limited(o.jobs),
    /** All that can be sent; the new one joins them under its final name. */
    snapshots: source.snapshots.filter(({ readonly }) => readonly),
    /** The names that the clock leapt to, and that somebody vouched for. */
    leaps: source.owned.leaps,
  };
}

/** The destinations of the command line, and with --locked-dests of the source's record. */
function wantedIn(
  source: Source,
  known: ReadonlyMap<string, KnownDestination>,
  o: RunOptions,
  report: Report,
): Map<string, Wanted> {
  const wanted = new Map(o.destinations.map((one) => [one.location.id, one]));
  const doubt = disbelief(source);
  for (const id of o.lockedDestinations ? known.keys() : []) {
    if (wanted.has(id)) continue;
    if (doubt !== null)
      report.error(id, new Failure(`--locked-dests: ${doubt}: name the destination to use it`));
    else
      wanted.set(id, {
        location: recordedLocation(id),
        recorded: true,
        optional: false,
        policy: o.backupPolicy,
        sending: o.sendingTo(id),
      });
  }
  return wanted;
}

/** Writes down what is known of destinations, one call after another. Errors: AlreadyTold. */
function save(session: Session): Promise<void> {
  const saved = session.saving
    .then(() => writeKnown(session))
    .catch((error) => {
      if (!session.isTold) session.report.error(null, error);
      session.isTold = true;
      throw new AlreadyTold((error as Error).message);
    });
  session.saving = saved.catch(() => {});
  return saved;
}

async function writeKnown(session: Session): Promise<void> {
  const { o, source, known, leaps } = session;
  const chain = {
    ...source.owned,
    ...(leaps === undefined ? {} : { leaps }),
    ...(known.size > 0 || source.chain.destinations ? { destinations: [...known.values()] } : {}),
  };
  // What 0.3.1 made has no owner until a run has said whose it is, and a copy cannot; a disk of
  // backups can be mounted read-only.
  const isSilent =
    source.source === null &&
    (source.owned.owner === undefined || placeOn(source.mounts, source.path).mount.readonly);
  if (o.dryRun || isSilent || JSON.stringify(chain) === session.written) return;
  await writeRecord(source, chain);
  session.written = JSON.stringify(chain);
}

/** Begins to look at what is mostly the next parent, while the destinations are opened. */
function lookAtPins({ o, source, inquiry, wanted, known }: Session): void {
  if (!o.transfer || source.alone) return;
  const pins = new Set([...wanted.keys()].map((id) => known.get(id)?.pin?.uuid));
  const parents = source.snapshots.filter(
    (one) => pins.has(one.uuid) && changedSince(one, inquiry, {}) === undefined,
  );
  void learn(inquiry, parents, []).catch(() => {});
}

function warnOfSource({ o, report, source, wanted }: Session): void {
  warnOfNested(source, report);
  warnOfDuplicates(source, report);
  const asked = [...wanted.values()].filter(({ policy }) => policy !== null);
  if (asked.length > 0 && asked.every(({ location }) => location.kind === "shell"))
    report.warning(
      "--num-backups: a shell:// command cannot be asked what it has, nor told to delete",
    );
  const tomorrow = wallClock(new Date()) + DURATION.d;
  const future = source.snapshots.filter(({ time }) => time > tomorrow).map(({ name }) => name);
  if (future.length > 0)
    report.warning(
      `${count(future.length, "snapshot")} of ${o.source.id} ${future.length === 1 ? "is" : "are"} dated in the future: ${someOf(future, 3)}; is the clock right?`,
    );
  const { unreadable } = source.record;
  if (unreadable !== null)
    report.error(
      null,
      new Failure(
        `${source.path}/.btrfs-backup.json cannot be read (${unreadable}): nothing is deleted at the source; "btrfs-backup unpin --all ${o.source.id}" moves it aside`,
      ),
    );
}

/** Warns of subvolumes below SOURCE: a snapshot has empty directories in their place. */
function warnOfNested({ source, subvolumes, top, subvolume }: Source, report: Report): void {
  if (source === null) return;
  const above = source.top === "/" ? "/" : `${source.top}/`;
  const paths = subvolumes
    .map(({ path }) => `/${path}`)
    .filter((path) => path.startsWith(above) && !isWithin(path, top))
    .map((path) => path.slice(above.length));
  if (paths.length > 0)
    report.warning(
      `${count(paths.length, "subvolume")} below ${subvolume} ${paths.length === 1 ? "is" : "are"} not part of its snapshots: ${someOf(paths, 3)}`,
    );
}

const someOf = (words: readonly string[], most: number, between = ", ") =>
  [...words.slice(0, most), ...(words.length > most ? ["…"] : [])].join(between);

// ── run: opening the source ──

/** A subvolume with its snapshot folder; `owned`: the folder's record, with it as the owner. */
type Source = Folder & {
  readonly identity: Identity;
  readonly subvolume: string;
  readonly owned: ChainRecord;
};

/** Finishes what a restore of SOURCE began, and opens it. Errors: those of openSource. */
async function openFinished(
  o: Parameters<typeof openSource>[0],
  locked?: () => void,
): Promise<Source> {
  try {
    return await openSource(o, locked);
  } catch (error) {
    const [, path] =
      (error instanceof Unfinished &&
        /: (\/.*)\.restoring-\d{8}-\d{6}\/\.btrfs-backup\.finishing$/s.exec(error.message)) ||
      [];
    if (path === undefined || o.dryRun) throw error;
    await finishRestores(o.source, path, o.hosts);
    return openSource(o, locked);
  }
}

/** Opens SOURCE and locks its snapshot folder. Errors: those of checkSource, Busy, Failure. */
async function openSource(
  o: Pick<
    RunOptions,
    "source" | "snapshotFolder" | "prefix" | "hosts" | "wait" | "dryRun" | "adopt" | "fsChecks"
  >,
  locked?: () => void,
): Promise<Source> {
  const path = resolve(o.source.path, o.snapshotFolder);
  const opening = {
    prefix: o.prefix,
    wait: o.dryRun ? ("look" as const) : o.wait,
    hosts: o.hosts,
    source: o.source.path,
    ...(locked && { locked }),
  };
  let strangers: readonly string[] | null = null;
  const folder = await openChecked(o.source, path, opening, (opened) => {
    checkSource(opened, path, o);
    // A folder inside SOURCE is SOURCE's own; one outside could be another's as well.
    const isInside = opened.source !== null && isWithin(opened.top, opened.source.top);
    strangers = isInside ? null : strangersBeside(opened, path, o.adopt);
  });
  const identity = identityOf(folder);
  const others = new Set<string>(strangers ?? []);
  return {
    ...folder,
    snapshots: folder.snapshots.filter(({ uuid }) => !others.has(uuid)),
    identity,
    subvolume: folder.source?.path ?? "",
    // Inside SOURCE nobody asks whose the folder is; it may be the end of somebody else's chain.
    owned: strangers === null ? folder.chain : ownedBy(identity, folder.chain, strangers),
  };
}

/** Errors: UsageError for a SOURCE that cannot be one. */
function checkSource(
  { source, place }: Folder,
  path: string,
  { source: { id }, fsChecks }: Pick<RunOptions, "source" | "fsChecks">,
): void {
  if (source?.filesystem === null && fsChecks) throw new UsageError(`not on btrfs: ${id}`);
  if (source?.inode !== 256) throw new UsageError(`not a subvolume: ${id}`);
  if (place.filesystem !== source.filesystem)
    throw new UsageError(`the snapshot folder ${path} is not on the filesystem of ${id}`);
}

/** Other sources' snapshots in a snapshot folder outside SOURCE. Errors: Failure. */
function strangersBeside(folder: Folder, path: string, adopt: boolean): readonly string[] {
  const { source, chain, snapshots, subvolumes, alone } = folder;
  const origin = subvolumes.find(({ uuid }) => uuid === source?.uuid)?.parentUuid;
  const children = snapshots.filter(
    ({ uuid, parentUuid }) => parentUuid === source?.uuid || uuid === origin,
  );
  const claimed = claim(identityOf(folder), chain, snapshots, children, adopt);
  if (!claimed.accepted) throw new Failure(`${path}: ${claimed.why}`);
  if (alone && claimed.strangers.length > 0)
    needRoot(folder, "telling other sources' snapshots in that folder");
  return claimed.strangers;
}

/** SOURCE as a record names it. Without root, its UUID is the recorded one of its path. */
function identityOf({ source, hostName, alone, chain: { owner } }: Folder): Identity {
  const place = { host: hostName, path: source?.path ?? "" };
  const isRecorded = alone && owner?.host === place.host && owner.path === place.path;
  return { uuid: isRecorded ? owner.uuid : (source?.uuid ?? ""), ...place };
}

/** The destinations that a source's record knows, with what 0.3.1 has done since. */
function knownDestinations({ chain, old, snapshots, prefix }: Folder): KnownDestination[] {
  const ours = (names: readonly string[] = []) =>
    names.filter((name) => parseName(name, prefix) !== null);
  const recorded = chain.destinations ?? [];
  const theirs = [...new Set([...old.receiving.keys(), ...old.parents.keys()])]
    .map((location) => {
      const known = recorded.find((one) => one.location === location);
      // The later one of two pins: 0.3.1 may have sent since, or remember an older one.
      const pin = snapshots.findLast(
        ({ name, uuid }) =>
          ours(old.parents.get(location)).includes(name) || uuid === known?.pin?.uuid,
      );
      return {
        location,
        filesystem: null,
        last: null,
        ...known,
        pin: pin ? { name: pin.name, uuid: pin.uuid } : (known?.pin ?? null),
        receiving: ours(old.receiving.get(location)),
      };
    })
    .filter(({ pin, receiving: begun }) => pin !== null || begun.length > 0);
  return [
    ...recorded.filter(({ location }) => !theirs.some((one) => one.location === location)),
    ...theirs,
  ];
}

/**
 * Why the destinations of a source's record are opened only where the command line names them;
 * null where only we can have written the record.
 */
function disbelief(
  source: Pick<Folder, "host" | "trusted" | "chain" | "id" | "path">,
): string | null {
  if (source.host.ssh !== null) return `the record of ${source.id} is another host's`;
  if (!source.trusted)
    return `${source.path}, or the record in it, belongs to another user or can be written by others`;
  if (source.chain.guarded)
    return `the record in ${source.path} was written by a guarded key, or came back with a restored backup`;
  return null;
}

/** A location from a source's record. Errors: Failure. */
function recordedLocation(id: string): Location {
  try {
    return parseLocation(id);
  } catch (error) {
    throw new Failure(`a known destination cannot be used (unpin it): ${(error as Error).message}`);
  }
}

// ── run: opening destinations ──

/** A destination as it is asked for, and as the source knows it. `id`: what its record calls it. */
type Asked = Wanted & { readonly id: string; readonly known: KnownDestination | undefined };
type AskedPlace = Asked & { readonly location: Readable };

/** The destinations that are being opened, in the order of their names. */
type Openings = readonly { readonly asked: Asked; readonly destination: Promise<Destination> }[];

/**
 * Opens the destinations side by side. Those of one host are opened one after another, since the
 * first one's connection serves the others; and all of them are if locks are waited for, so that
 * two runs cannot wait for each other.
 */
function openAll(session: Session): Openings {
  const { o, wanted, known } = session;
  const queues = new Map<string, Promise<unknown>>();
  const queueOf = ({ id, location }: Asked) => {
    if (o.wait > 0) return "";
    return location.kind === "shell" || location.host === null ? id : JSON.stringify(location.host);
  };
  const sorted = [...wanted].sort(([a], [b]) => (a < b ? -1 : 1));
  return sorted.map(([id, one]) => {
    const asked = { ...one, id, known: known.get(id) };
    const queue = queueOf(asked);
    const ready = queues.get(queue) ?? Promise.resolve();
    const destination = ready.then(() => openDestination(session, asked));
    queues.set(
      queue,
      destination.catch(() => {}),
    );
    return { asked, destination };
  });
}

/** Closes what is being opened, if it is. */
const closed = (opening: Promise<Pick<Folder, "close">>) =>
  opening.then(
    (opened) => opened.close(),
    () => {},
  );

/** How long new destinations may take, in ms, before the snapshot is taken all the same. */
const LOOK = 5e3;

/**
 * The destinations that are open before the snapshot is taken. The snapshot waits only for new ones
 * on this host, since nothing that makes no sense should take one. Errors: UsageError.
 */
async function openedAtOnce(openings: Openings): Promise<readonly Destination[]> {
  const opened: Destination[] = [];
  for (const { destination } of openings)
    destination.then(
      (one) => opened.push(one),
      () => {},
    );
  const fresh = openings.filter(
    ({ asked: { known, location } }) =>
      known === undefined && hasPath(location) && location.host === null,
  );
  const looked = Promise.all(
    fresh.map(({ destination }) =>
      destination.catch((error: unknown) => {
        if (error instanceof UsageError || error instanceof Interrupted) throw error;
      }),
    ),
  );
  if (await within(LOOK, looked)) await looked;
  return opened;
}

const hasPath = (location: Location): location is Readable =>
  location.kind !== "shell" && location.kind !== "rclone";

/**
 * The destinations that can be served, when all have been opened; what fails is reported. Errors:
 * UsageError, Interrupted.
 */
async function openedInTime(
  session: Session,
  openings: Openings,
  taken: Snapshot | null,
): Promise<Served[]> {
  const snapshots = [...session.snapshots, ...(taken === null ? [] : [taken])];
  const all: Served[] = [];
  const results = await Promise.allSettled(openings.map(({ destination }) => destination));
  for (const [i, { asked }] of openings.entries()) {
    const result = results[i] as PromiseSettledResult<Destination>;
    if (result.status === "fulfilled") {
      all.push(toServe(session, result.value, asked));
      continue;
    }
    const error: unknown = result.reason;
    const { id, known, optional, recorded } = asked;
    if (error instanceof UsageError || error instanceof Interrupted) throw error;
    if (error instanceof Absent && optional) skip(session, asked, error);
    else if (error instanceof Absent && recorded && !isOutstanding(known, snapshots))
      log.debug(`${id} has all there is: ${error.message}`);
    else session.report.error(id, error);
  }
  return all;
}

/** Whether a destination lacks any of a source's snapshots that a run would send it. */
const isOutstanding = (
  known: KnownDestination | undefined,
  snapshots: readonly Snapshot[],
): boolean =>
  known?.pin?.uuid !== snapshots.at(-1)?.uuid ||
  (known?.failed ?? []).some((uuid) => snapshots.some((one) => one.uuid === uuid)) ||
  (known?.receiving ?? []).length > 0;

/** An optional destination that is not there is a failure only after it was away for too long. */
function skip({ o: { maxAge }, report }: Session, { id, known }: Asked, { message }: Absent): void {
  const last = known?.last ?? null;
  if (
    maxAge !== null &&
    (last === null || Date.parse(last) < before(Date.now(), maxAge.count, maxAge.unit))
  )
    return report.error(
      id,
      new Failure(
        `not there, and last served ${last === null ? "never" : `at ${last}`}, longer ago than ${maxAge.text}: ${message}`,
      ),
    );
  log.info(`Skipping ${id}: ${message}`);
  report.event("skipped", { destination: id, message });
}

/** How destinations are opened. */
const destinationOpening = (o: RunOptions): Opening => ({
  prefix: o.prefix,
  wait: o.dryRun ? "look" : o.wait,
  hosts: o.hosts,
  peer: hostOf(o.source.host, o.hosts),
});

/**
 * A destination that begins to be opened while the source is. It locks and looks after `go`;
 * `drop` ends it, or closes what was opened.
 */
type Ahead = {
  readonly folder: Promise<Folder>;
  readonly go: () => void;
  readonly drop: () => Promise<unknown>;
};

/**
 * Begins to open the destinations that need no other one's connection, unless locks are waited for.
 * Two hosts at once could ask for passwords at once.
 */
function beginOpening(o: RunOptions): Map<string, Ahead> {
  const hosts = new Set<string>();
  const ahead = new Map<string, Ahead>();
  if (o.wait > 0) return ahead;
  const sorted = o.destinations
    .map(({ location }) => location)
    .sort((a, b) => (a.id < b.id ? -1 : 1));
  for (const location of sorted) {
    if (!hasPath(location)) continue;
    const host = JSON.stringify(location.host);
    if (location.host !== null && (o.source.host !== null || hosts.has(host))) continue;
    hosts.add(host);
    const controller = new AbortController();
    let go = () => {};
    const turn = new Promise<void>((over) => (go = over));
    const folder = openFolder(location, location.path, {
      ...destinationOpening(o),
      ahead: { turn, unwanted: controller.signal },
    });
    folder.catch(() => {}); // its error is told in its turn
    const drop = () => {
      controller.abort();
      return within(5000, closed(folder)); // on a dead disk nothing ends
    };
    ahead.set(location.id, { folder, go, drop });
  }
  return ahead;
}

/** Opens a destination if it is the right place. Errors: UsageError, Absent, Busy, Failure. */
async function openDestination(session: Session, asked: Asked): Promise<Destination> {
  const { o, report, source } = session;
  const { location, known, sending } = asked;
  needRoot(source, "sending");
  if (location.kind !== "shell") {
    const open = location.kind === "folder" ? openBackups : openStore;
    return open(session, { ...asked, location });
  }
  const lock = lockAtSource(session, location.id);
  const program = await commandShell(report);
  const chain = { prefix: o.prefix, source: o.source.id };
  return shellDestination(location, known?.pin ?? null, program, lock, chain, sending);
}

/** The lock for a destination where nothing can be locked. A remote source's one is here. */
function lockAtSource({ o, source }: Session, id: string): string {
  if (o.source.host !== null) return lockFile(`${o.source.id}\n${o.prefix}\n${id}`);
  // Through the process that holds the folder, it is found behind the fence.
  const folder = source.fenced && source.holder !== "" ? `/proc/${source.holder}/cwd` : source.path;
  return join(folder, `.btrfs-backup.${o.prefix}.${digestOf(id).slice(0, 8)}.receiving`);
}

/** A lock among the runtime files, for a chain that has no folder here. */
const lockFile = (chain: string) =>
  join(dirname(runtimeDirectory()), `btrfs-backup.${digestOf(chain).slice(0, 32)}.receiving`);

const MOUNTED = "(is the disk mounted?)";

const sameFilesystem = (source: Source) =>
  new Absent(
    `it lies on the filesystem of ${source.id} itself ${MOUNTED}; --skip-fs-checks allows it`,
  );

// ── run: opening a folder of backups ──

/** Opens a place for backups that passes a check; `lookAgain` looks at it once more. */
async function openPlace(
  { o, source, ahead }: Session,
  { location, known }: AskedPlace,
  check: (opened: Folder) => void,
) {
  const opening = destinationOpening(o);
  const begun = ahead.get(location.id);
  begun?.go();
  ahead.delete(location.id); // whoever opens it closes it
  const isKnown = known !== undefined;
  const folder = await openNew(location, opening, source, isKnown, check, begun?.folder);
  const lookAgain = () => openFolder(location, folder.path, { ...opening, wait: "look" });
  return { folder, lookAgain };
}

/** Opens a folder of backups, and writes its record, if it is the right one. */
async function openBackups(session: Session, asked: AskedPlace): Promise<Destination> {
  const { o, report, source } = session;
  const { location, known, sending } = asked;
  let strangers: readonly string[] = [];
  const { folder, lookAgain } = await openPlace(session, asked, (opened) => {
    checkBackups(session, asked, opened);
    strangers = strangersAmong(session, opened);
    compressionBetween(source, opened, sending.level);
  });
  const { receiving: announced, since: _, ...settled } = folder.chain;
  // An announcement outlives its transfer only as long as its leftover is to be told by it.
  const isBroken = folder.snapshots.some(({ name, readonly }) => name === announced && !readonly);
  const owned = ownedBy(source.identity, isBroken ? folder.chain : settled, strangers);
  const { owner } = folder.chain;
  const { uuid, host, path } = source.identity;
  if (owner?.uuid === uuid && (owner.host !== host || owner.path !== path))
    log.info(
      `${location.id}: its backups were made on ${owner.host}:${owner.path}; their source is ${host}:${path} now`,
    );
  // Taken over, moved, or completed after all: the record says so even if nothing is sent.
  const isStanding = owner !== undefined || folder.snapshots.some(isComplete);
  // The data of what was completed after all must be on the disk before its announcement goes.
  if (!o.dryRun && isStanding && !sameRecord(folder.chain, owned))
    await writeRecord(folder, owned, announced !== undefined && !isBroken);
  warnOfDuplicates(folder, report);
  return folderDestination(
    folder,
    lookAgain,
    owned,
    disbelief(source) === null ? (known?.receiving ?? []) : [],
    { ...o.deletion, btrfsDebug: o.btrfsDebug, sending },
  );
}

/** Errors: UsageError, Absent, Failure for a folder that is not the destination. */
function checkBackups({ o, source }: Session, asked: Asked, folder: Folder): void {
  const known = o.adopt ? undefined : asked.known;
  needRoot(folder, "receiving");
  const { filesystem } = folder.place;
  const isSame = filesystem !== null && filesystem === source.place.filesystem;
  if (isSame && nested(folder.top, source.top)) throw nestedError(asked.location.id);
  if (filesystem === null && o.fsChecks) throw new Absent(`not on btrfs ${MOUNTED}`);
  if (known?.filesystem) checkFilesystem(folder, known.filesystem);
  if (isSame && o.fsChecks) throw sameFilesystem(source);
  // 0.3.1 remembered no filesystem: an empty place is not where its backups were.
  const isOld = known?.pin && known.filesystem === null;
  if (isOld && !folder.snapshots.some(isComplete))
    throw new Absent(`the backups that 0.3.1 made are not there ${MOUNTED}; --adopt begins anew`);
}

/** Errors: Absent where the backups do not stand on the filesystem that they were on. */
function checkFilesystem({ place, exists, chain, record }: Folder, known: string): void {
  if (place.filesystem !== known)
    throw new Absent(
      `it lies on another filesystem (${place.filesystem}) than before (${known}) ${MOUNTED}; --adopt accepts a replaced disk`,
    );
  if (!exists || (chain.owner === undefined && record.unreadable === null))
    throw new Absent(`what was backed up there is gone ${MOUNTED}; --adopt begins anew`);
}

/** The backups of other sources in a folder. Errors: Failure where the folder is not ours. */
function strangersAmong({ o, source }: Session, { snapshots, chain }: Folder): readonly string[] {
  const complete = snapshots.filter(isComplete);
  const here = dataFinder(source.snapshots);
  const shared = complete.filter((backup) => here(backup) !== undefined);
  const claimed = claim(source.identity, chain, complete, shared, o.adopt);
  if (!claimed.accepted) throw new Failure(claimed.why);
  return claimed.strangers;
}

// ── run: opening a store of streams ──

/** Opens a store if it is the right one. Errors: Absent, Busy, Failure. */
async function openStore(session: Session, asked: AskedPlace): Promise<Destination> {
  const { o, report } = session;
  const { id } = asked.location;
  const lock = lockAtSource(session, id);
  const { folder, lookAgain } = await openPlace(session, asked, (opened) =>
    checkStore(session, asked, opened),
  );
  const { owner, own, lineages } = streamsIn(folder, session);
  const store = folder.store as Store;
  const broken = store.streams.filter((one) => one.stored && !one.readonly);
  if (broken.length > 0)
    report.warning(
      `${id}: ${count(broken.length, "stream")} cannot be restored, since what ${broken.length === 1 ? "it builds" : "they build"} on is missing: ${broken[0]?.name}${broken.length > 1 ? " …" : ""}`,
    );
  return storeDestination(
    folder,
    store,
    lookAgain,
    standingInStore(store, o.prefix, lineages),
    { ...owner, lineage: own.at(-1)?.owner.lineage ?? owner.lineage },
    lock,
    asked.sending,
  );
}

/** The streams of a prefix in a store: all, and the source's own; and what these say of it. */
function streamsIn(folder: Folder, { o, source }: Session) {
  const ours = folder.standing.filter(({ name }) => parseName(name, o.prefix) !== null) as Stream[];
  const owner = ownerOf(source.identity);
  const lineages = lineagesOf(ours, owner, source.snapshots);
  return { ours, own: ours.filter((one) => lineages.has(one.owner.lineage)), owner, lineages };
}

/** Errors: UsageError, Absent, Failure for a store that is not the destination. */
function checkStore(session: Session, { location, known, sending }: Asked, folder: Folder): void {
  const { o, source } = session;
  checkFilters(source, sending);
  if (location.kind === "raw") needApart(session, location.id, folder);
  if (o.adopt) return;
  const { ours, own, owner } = streamsIn(folder, session);
  if (known?.pin && ours.length === 0)
    throw new Absent(`what was stored there is gone ${MOUNTED}; --adopt begins anew`);
  const isOwn = ({ owner: { uuid, place } }: Stream) =>
    uuid === owner.uuid || place === owner.place;
  if (ours.length > 0 && !own.some(isOwn)) {
    const [whose, goingOn] =
      own.length === 0
        ? ["another source", "stores beside them"]
        : ["this source as it was elsewhere", "goes on with them"];
    throw new Failure(
      `the streams there belong to ${whose} (subvolume ${(own.at(-1) ?? ours.at(-1))?.owner.uuid}); this one is ${source.identity.host}:${source.identity.path} (subvolume ${owner.uuid}). Use a prefix (-p) or another place; --adopt ${goingOn}`,
    );
  }
  if (sending.recipients.length === 0 && own.at(-1)?.encrypted)
    throw new Failure(
      "what is stored there is encrypted, and this would not be: --encrypt-to is missing (--adopt stores in the clear)",
    );
}

/** Errors: UsageError, Absent where streams would lie with their source. */
function needApart({ o, source }: Session, id: string, folder: Folder): void {
  if (
    sameHost(folder.host, source.host) &&
    folder.hostName === source.hostName &&
    nested(folder.path, source.path)
  )
    throw nestedError(id);
  const isSame =
    folder.host.ssh === null &&
    source.host.ssh === null &&
    placeOn(folder.mounts, folder.place.path).mount.device ===
      placeOn(source.mounts, source.path).mount.device;
  if (isSame && o.fsChecks) throw sameFilesystem(source);
}

// ── run: taking the snapshot ──

/** Takes the snapshot, between the user's own commands; null where it fails, which is reported. */
async function takeSnapshot(
  session: Session,
  opened: readonly Destination[],
): Promise<Snapshot | null> {
  const { o, report, source } = session;
  const hook = async (command: string | null, option: string) => {
    if (command !== null && !o.dryRun)
      log.debug((await ask(plainHost(source.host), HOOK, { command }, `${option} failed`)).trim());
  };
  const after = () =>
    hook(o.afterSnapshot, "--after-snapshot").catch((error) => report.error(null, error));
  try {
    const taken = await hook(o.beforeSnapshot, "--before-snapshot")
      .then(() => snapshotOfNow(session, opened))
      .finally(() => whileCleaning(after));
    log.info(`${o.dryRun ? "Would take" : "Took"} snapshot ${taken.name} of ${o.source.id}`);
    return taken;
  } catch (error) {
    report.error(null, error);
    return null;
  }
}

/** Takes a snapshot in the first second whose name is free on both sides. Errors: Failure. */
async function snapshotOfNow(
  { o, source, display }: Session,
  opened: readonly Destination[],
): Promise<Snapshot> {
  const { identity, place, alone, subvolume } = source;
  for (; ; await nextSecond()) {
    checkInterruption();
    const now = new Date();
    const name = snapshotName(o, now);
    // When clocks go back, a destination can still have the name.
    if (source.entries.has(name) || isTakenAt(opened, name)) continue;
    const made = {
      ...NO_SUBVOLUME,
      name,
      time: wallClock(now),
      moment: Math.floor(now.getTime() / 1000) * 1000,
      path: name,
      parentUuid: identity.uuid,
      cgen: Number.MAX_SAFE_INTEGER,
    };
    if (o.dryRun) return { ...made, id: Number.MAX_SAFE_INTEGER, uuid: crypto.randomUUID() };
    const shown = await ask(
      source.host,
      SNAPSHOT,
      { source: subvolume, ...at(source), name },
      `cannot take a snapshot of ${subvolume}`,
    ).catch((error) => {
      if (error instanceof Taken) return null;
      throw error;
    });
    if (shown === null) continue;
    const uuid = shownField(shown, "UUID");
    // In the place of a snapshot, somebody else's directory can stand by now.
    const isChecked = !alone && identity.uuid !== place.filesystem;
    if (isChecked && shownField(shown, "Parent UUID") !== identity.uuid)
      throw new Failure(`${join(source.path, name)} is not the snapshot that was taken: ${uuid}`);
    const size = /^\s+Usage referenced:\s+(\d+)/m.exec(shown)?.[1];
    if (size !== undefined) display.sizes.set(uuid, Number(size));
    return { ...made, id: Number(shownField(shown, "Subvolume ID")), uuid };
  }
}

const snapshotName = ({ prefix }: Pick<RunOptions, "prefix">, date: Date) =>
  `${prefix}${stamp(date)}` as EntryName; // a prefix holds nothing that a name cannot

const isTakenAt = (all: readonly Pick<Destination, "standing">[], name: string) =>
  all.some(({ standing }) => standing.taken.has(name));

const NO_SUBVOLUME: Subvolume = {
  id: 0,
  path: "",
  uuid: "",
  parentUuid: null,
  receivedUuid: null,
  readonly: true,
};

/**
 * Gives the new snapshot another name where a destination that has answered since has something by
 * its name: clocks go back.
 */
async function withFreeName(
  { o, source }: Session,
  taken: Snapshot,
  all: readonly Served[],
): Promise<Snapshot> {
  for (let free = taken.name; ; await nextSecond(), free = snapshotName(o, new Date())) {
    if (isTakenAt(all, free) || (free !== taken.name && source.entries.has(free))) continue;
    if (free === taken.name || o.dryRun) return taken;
    await ask(
      source.host,
      RENAME,
      { ...at(source), name: taken.name, to: free },
      `cannot rename ${join(source.path, taken.name)}`,
    );
    log.info(`${taken.name} is ${free} now: a destination has something else by that name`);
    const time = parseName(free, o.prefix) as number;
    return { ...taken, name: free, path: free, time, moment: momentOf(time) };
  }
}

/** Waits until names say the next second. */
async function nextSecond(): Promise<void> {
  await new Promise((over) => setTimeout(over, 1000 - new Date().getMilliseconds()));
}

// ── run: what is known of parents ──

/** Facts about a place's snapshots, as far as they were asked for. */
type Inquiry = ReturnType<typeof inquiryInto>;

const inquiryInto = (folder: Folder) => ({
  folder,
  all: byUuid(folder.subvolumes),
  ctransids: new Map<string, number>(),
  births: new Map<string, number | null>(),
  losses: new Map<string, string | null>(),
  asking: Promise.resolve(),
});

/** A difference that could be sent. */
type Pair = { readonly parent: Snapshot; readonly snapshot: Snapshot };

/**
 * Learns when some snapshots were changed last. Of differences it learns whether their two sides
 * are related (the generations of the top directories), and what would be lost. Nothing is asked
 * twice. Errors: Failure.
 */
function learn(
  inquiry: Inquiry,
  changed: readonly Entry[],
  differences: readonly Pair[],
): Promise<void> {
  const asking = inquiry.asking.then(async () => {
    const { ctransids } = inquiry;
    for (const some of batches(changed.filter(({ uuid }) => !ctransids.has(uuid))))
      await learnChanges(inquiry, some);
    await learnComing(inquiry, differences);
    await learnBirths(inquiry, differences);
    await learnLosses(inquiry, differences);
  });
  inquiry.asking = asking.catch(() => {});
  return asking;
}

const pathsOf = (some: readonly Entry[]) => some.map(({ name }) => `./${name}`);

/** Snapshots in as few commands as their names fit into. */
function batches(all: readonly Entry[]): (readonly Entry[])[] {
  let done = 0;
  return chunks(pathsOf(all)).map(({ length }) => all.slice(done, (done += length)));
}

/** Asks when snapshots were changed last. Errors: Failure where one cannot be looked at. */
async function learnChanges({ folder, ctransids }: Inquiry, some: readonly Entry[]): Promise<void> {
  const shown = await ask(
    folder.host,
    HEADS,
    { ...at(folder), snapshots: pathsOf(some) },
    `${folder.id}: cannot tell when snapshots were changed`,
  );
  const heads = shown.split("\n");
  for (const [i, one] of some.entries()) ctransids.set(one.uuid, changedIn(heads[i] ?? "", one));
}

/**
 * Asks when the parents were changed last. One that is still to be sent, and cannot be looked at,
 * is found out when it is its turn: it may as well have been edited.
 */
async function learnComing(inquiry: Inquiry, differences: readonly Pair[]): Promise<void> {
  const parents = [...new Set(differences.map(({ parent }) => parent))].filter(
    (parent) => changedSince(parent, inquiry, {}) === undefined,
  );
  const learnEach = async (some: readonly Entry[]) => {
    for (const one of some)
      await learnChanges(inquiry, [one]).catch(
        afterFailure(() => void inquiry.ctransids.set(one.uuid, Infinity)),
      );
  };
  for (const some of batches(parents))
    await learnChanges(inquiry, some).catch(afterFailure(() => learnEach(some)));
}

/** What to do after a Failure. Errors: all others. */
const afterFailure =
  <T>(work: (failure: Failure) => T) =>
  (error: unknown): T => {
    if (!(error instanceof Failure)) throw error;
    return work(error);
  };

/** Asks for the top directories' generations where nothing else tells what is related. */
async function learnBirths(inquiry: Inquiry, differences: readonly Pair[]): Promise<void> {
  const { folder, births } = inquiry;
  const asked = differences.flatMap(({ parent, snapshot }) =>
    related(parent, snapshot, inquiry) === undefined ? [parent, snapshot] : [],
  );
  for (const some of batches([...new Set(asked)].filter(({ uuid }) => !births.has(uuid)))) {
    const shown = await ask(
      folder.host,
      BIRTHS,
      { ...at(folder), snapshots: pathsOf(some) },
      `${folder.id}: cannot tell where snapshots come from`,
    );
    const generations = new Map<string, number>();
    for (const [, generation, name = ""] of shown.matchAll(/^ *(\d+) +\S+ \.\/(.*)$/gm))
      generations.set(name, Number(generation));
    for (const { uuid, name } of some) births.set(uuid, generations.get(name) ?? null);
  }
}

/** Looks into the differences to parents that are not known to be earlier states. */
async function learnLosses(inquiry: Inquiry, differences: readonly Pair[]): Promise<void> {
  const { folder, losses } = inquiry;
  for (const pair of differences) {
    const { parent, snapshot } = pair;
    const key = pairOf(parent, snapshot);
    if (losses.has(key) || !related(parent, snapshot, inquiry)) continue;
    if (!isStillEarlier(parent, snapshot, inquiry)) losses.set(key, await lossOf(folder, pair));
  }
}

/**
 * Why a difference must not be made to a state that is not known to be an earlier one; null if it
 * may. Errors: none: what cannot be looked at is not made.
 */
function lossOf(folder: Folder, pair: Pair): Promise<string | null> {
  const why = `${pair.parent.name} is not known to be an earlier state of ${pair.snapshot.name}`;
  return lostIn(folder, pair).then(
    (lost) => (lost === null ? null : `${why}, and btrfs send would lose the end of ${lost}`),
    afterFailure(
      ({ message }) =>
        `${why}, and it cannot be told whether btrfs send would lose something: ${message}`,
    ),
  );
}

/** The first file whose end a difference would lose; null if there is none. Errors: Failure. */
async function lostIn(folder: Folder, { parent, snapshot }: Pair): Promise<string | null> {
  const { host } = folder;
  const names = { ...at(folder), snapshot: snapshot.name, parent: parent.name };
  const ranges = parseRewritten(await askBytes(host, REWRITTEN, names, "cannot tell what differs"));
  for (const paths of chunks([...ranges.keys()].map((path) => `/${path}`))) {
    const what = "cannot tell the sizes of what differs";
    const sizes = (await ask(host, FILE_SIZES, { ...names, paths }, what)).split("\n");
    const files = paths.map((absolute, i) => {
      const path = absolute.slice(1);
      const [, size, former] = /^(\d+) (\d+|-)$/.exec(sizes[i] ?? "") ?? [];
      if (size === undefined) throw new Failure(`cannot tell the size of ${absolute}`);
      const earlier = former === "-" ? null : Number(former);
      return { path, ranges: ranges.get(path) ?? [], size: Number(size), before: earlier };
    });
    const lost = lossIn(files);
    if (lost !== null) return lost;
  }
  return null;
}

/** So many paths at most are looked at for renames. */
const FOLLOWED = 10_000_000;

/**
 * The ranges that a difference without data writes to, by the path in the snapshot. A file is
 * written to by the path of that moment; renames of it, or of a directory above it, are followed.
 * Errors: Failure for what cannot be followed.
 */
export function parseRewritten(difference: Buffer): Map<string, { from: number; to: number }[]> {
  const { attribute } = streamCommands();
  const files = new Map<string, { from: number; to: number }[]>();
  let steps = 0;
  const rename = (from: string, to: string) => {
    if ((steps += files.size) > FOLLOWED) throw new Failure("too much was renamed");
    const moved = [...files].filter(([path]) => path === from || path.startsWith(`${from}/`));
    for (const [path] of moved) files.delete(path);
    for (const [path, ranges] of moved) files.set(to + path.slice(from.length), ranges);
  };
  for (const { name, text, number } of commandsIn(difference)) {
    if (name === "end") break;
    const path = text(attribute.path);
    const ranges = files.get(path) ?? [];
    if (name === undefined) throw new Failure("btrfs send said something unknown");
    if (name === "rename") rename(path, text(attribute.pathTo));
    else if (name === "unlink" && files.has(path))
      throw new Failure("a file is changed by a name that it loses");
    else if (name === "truncate") files.set(path, ranges);
    else if (["update_extent", "clone", "write", "encoded_write"].includes(name)) {
      const from = number(attribute.offset);
      const length = number(name === "clone" ? attribute.cloneLength : attribute.size);
      ranges.push({ from, to: from + length });
      files.set(path, ranges);
    }
  }
  return new Map([...files].map(([path, ranges]) => [pathOf(path), ranges]));
}

/** A path as text. Errors: Failure for what is not UTF-8, and cannot be asked for. */
function pathOf(latin1: string): string {
  const path = Buffer.from(latin1, "latin1").toString();
  if (Buffer.from(path).toString("latin1") !== latin1)
    throw new Failure(`a name is not UTF-8: ${path}`);
  return path;
}

/**
 * The commands of a send stream of protocol 1, with the attributes that are looked for. Errors:
 * Failure for a stream that is cut off.
 */
function* commandsIn(sent: Buffer): Generator<{
  readonly name: string | undefined;
  readonly text: (attribute: number) => string;
  readonly number: (attribute: number) => number;
}> {
  const { commands } = streamCommands();
  const UPDATE_EXTENT = 22; // in place of what writes, without data
  if (sent.toString("latin1", 0, 17) !== "btrfs-stream\0\x01\0\0\0")
    throw new Failure("btrfs send began with something unknown");
  for (let here = 17; here + 10 <= sent.length;) {
    const end = here + 10 + sent.readUInt32LE(here);
    const command = sent.readUInt16LE(here + 4);
    if (end > sent.length) break;
    const found = new Map<number, Buffer>();
    for (let next = here + 10; next + 4 <= end;) {
      const length = sent.readUInt16LE(next + 2);
      found.set(sent.readUInt16LE(next), sent.subarray(next + 4, next + 4 + length));
      next += 4 + length;
    }
    const bytes = (attribute: number, least: number) => {
      const value = found.get(attribute);
      if (value === undefined || value.length < least)
        throw new Failure("btrfs send left something out");
      return value;
    };
    yield {
      name: command === UPDATE_EXTENT ? "update_extent" : commands[command]?.name,
      text: (attribute) => bytes(attribute, 0).toString("latin1"),
      number: (attribute) => Number(bytes(attribute, 8).readBigUInt64LE()),
    };
    if (commands[command]?.name === "end") return;
    here = end;
  }
  throw new Failure(
    sent.length >= Number(REWRITTEN_MOST) ? "too much differs" : "btrfs send ended early",
  );
}

// ── run: serving destinations ──

/** One run's view of a destination that could be opened. */
type Served = ReturnType<typeof toServe>;

const toServe = (session: Session, destination: Destination, wanted: Asked) => ({
  session,
  wanted,
  destination,
  standing: destination.standing,
  free: destination.free,
  /** What is still to be sent. */
  todo: [] as readonly Transfer[],
  /** Nothing failed that should have been sent. */
  complete: true,
  /** It is complete, and the source's record says so. */
  done: false,
  began: 0,
  /** Goes on beside other work. */
  pruning: Promise.resolve(),
  /** UUIDs of what could not be sent; and of what earlier runs could not, or has no free name. */
  failed: new Set<string>(),
  earlier: new Set(wanted.known?.failed),
  verdicts: { cleared: wanted.known?.cleared ?? {}, refused: new Map() } as Verdicts,
  /** A parent was compared with its backup. */
  compared: false,
});

/**
 * Sends all destinations what they lack, remembers what both sides share now, and begins to prune
 * them. What fails is reported.
 */
async function serve(all: readonly Served[], session: Session): Promise<void> {
  await allOf(
    all.map(async (served) => {
      served.began = Date.now();
      try {
        await begin(served);
      } catch (error) {
        served.complete = false;
        session.report.error(served.destination.id, error);
      }
    }),
  );
  await sendAll(all, session);
}

/**
 * Decides what a destination gets, and clears away what broken transfers left. Errors: those of
 * `discard`.
 */
async function begin(served: Served): Promise<void> {
  const { destination, wanted, standing } = served;
  const { o, report } = served.session;
  const { id } = destination;
  if (!o.transfer) return;
  const { transfers, conflicts, skipped } = await planFor(served);
  for (const { name, uuid, why } of conflicts) {
    report.error(id, new Failure(`${name} is not sent: ${why}; rename or remove it`));
    served.earlier.add(uuid);
    served.complete = false;
  }
  // All leftovers: the next announcement replaces the one of a leftover that is not sent again.
  for (const [name, what] of standing.taken)
    if (what === "leftover" && !o.dryRun) await destination.discard(name);
  if (!wanted.sending.resume && !o.dryRun) await destination.tidy();
  if (skipped > 0)
    log.info(
      `${id}: ${count(skipped, "snapshot")} older than the newest one there ${skipped === 1 ? "is" : "are"} not sent; --backfill sends them`,
    );
  if (transfers.length > 1 && standing.held.length === 0)
    log.info(
      `${id} is new: ${transfers.length} snapshots will be sent; --newest-only sends only the newest`,
    );
  served.todo = transfers;
}

/**
 * Plans what a destination gets. Asks for facts about the parents until nothing is missing. Errors:
 * Failure.
 */
async function planFor(served: Served): Promise<ReturnType<typeof planTransfers>> {
  const { session, destination, standing, verdicts } = served;
  const { stream: memory } = destination;
  const { inquiry, o } = session;
  const snapshots = session.snapshots.filter(({ uuid }) => !served.failed.has(uuid));
  const find = dataFinder(standing.held);
  const isThere = (parent: Snapshot) =>
    memory === null ? find(parent) !== undefined : parent.uuid === memory.last?.uuid;
  const mayBeEdited = (one: Snapshot) =>
    isThere(one) && changedSince(one, inquiry, verdicts.cleared) !== false;
  const { policy, sending } = served.wanted;
  const options = {
    policy,
    incremental: o.incremental,
    newestOnly: o.newestOnly,
    now: wallClock(new Date()),
    fullEvery: sending.fullEvery,
    backfill: o.backfill,
    failed: served.earlier,
  };
  for (;;) {
    const fitness = judge(inquiry, verdicts, isThere);
    const plan =
      memory === null
        ? planTransfers(snapshots, standing, options, fitness)
        : {
            transfers: planStreams(snapshots, memory.last, o, fitness),
            conflicts: [],
            skipped: 0,
          };
    const open = plan.transfers.flatMap(({ parent, snapshot }) =>
      parent !== null && fitness.unfit(parent, snapshot) === undefined
        ? [{ parent, snapshot }]
        : [],
    );
    if (open.length > 0) {
      // An edited or deduplicated snapshot is mostly not alone.
      const isSuspicious = snapshots.some(
        (one) => isThere(one) && changedSince(one, inquiry, verdicts.cleared),
      );
      const asked = isSuspicious ? snapshots : open.map(({ parent }) => parent);
      await learn(inquiry, asked.filter(mayBeEdited), open);
      continue;
    }
    if (destination.compare === null || served.compared) return plan;
    const isCandidate = (one: Snapshot) => mayBeEdited(one) && !verdicts.refused.has(one.uuid);
    const edited = worthComparing(plan.transfers, snapshots, isCandidate, inquiry);
    if (edited === undefined) return plan;
    served.compared = true;
    await clear(served, edited);
  }
}

/** The nearest candidate that could be the parent of the first snapshot that has none. */
function worthComparing(
  transfers: readonly Transfer[],
  snapshots: readonly Snapshot[],
  isCandidate: (one: Snapshot) => boolean,
  inquiry: Inquiry,
): Snapshot | undefined {
  const lacking = transfers.find(({ parent, why }) => parent === null && why !== undefined);
  if (lacking === undefined) return undefined;
  const { snapshot } = lacking;
  return snapshots
    .slice(0, snapshots.indexOf(snapshot))
    .findLast((one) => isCandidate(one) && related(one, snapshot, inquiry));
}

/**
 * Compares a snapshot that may have been edited with its backup, since nothing else that both
 * sides have can be a parent.
 */
async function clear(
  { session, destination, verdicts }: Served,
  snapshot: Snapshot,
): Promise<void> {
  const { inquiry, o, report } = session;
  const { name, uuid } = snapshot;
  const ctransid = inquiry.ctransids.get(uuid) as number;
  log.info(
    `${name} was changed after it was taken (edited, or only deduplicated): ${o.dryRun ? "would compare" : "comparing"} it with its backup at ${destination.id}, before a difference is made against it`,
  );
  try {
    if (o.dryRun || (await destination.compare?.(inquiry.folder, snapshot)))
      verdicts.cleared = { ...verdicts.cleared, [uuid]: ctransid };
    else {
      verdicts.refused.set(uuid, `${name} was edited since it was taken`);
      report.warning(
        `${name} differs from its backup at ${destination.id}: one of them was edited, and no difference is made against it; "btrfs-backup verify --snapshot ${shellWord(name)}" tells what differs`,
      );
    }
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    verdicts.refused.set(
      uuid,
      `${name} may have been edited since it was taken, and cannot be compared with its backup: ${error.message}`,
    );
  }
}

/** Sends destinations what they lack: equal streams once, others side by side. */
async function sendAll(all: readonly Served[], session: Session): Promise<void> {
  const ready = all.filter(({ todo }) => todo.length > 0);
  const alike = groupBy(ready, ({ todo: [next], destination }) => {
    const form = destination.form(session.source);
    return JSON.stringify([
      next?.snapshot.uuid,
      next?.parent?.uuid,
      ...(form === null ? [destination.id] : [form.level, form.protocol, form.rate]),
    ]);
  });
  await allOf(
    [...alike.values()].map(async (some) => {
      const [{ todo }] = some as [Served];
      const [next] = todo as [Transfer];
      await session.jobs(() => sendNext(some, next, session));
      await sendAll(some, session);
    }),
  );
  await allOf(all.filter((served) => !ready.includes(served)).map(conclude));
}

/** Lets so many works go on at a time. */
function limited(most: number): <T>(work: () => Promise<T>) => Promise<T> {
  let free = most;
  const waiting: (() => void)[] = [];
  return async (work) => {
    if (free > 0) free--;
    else await new Promise<void>((turn) => waiting.push(turn));
    try {
      return await work();
    } finally {
      const next = waiting.shift();
      if (next === undefined) free++;
      else next();
    }
  };
}

/**
 * Sends the next snapshot to destinations that need the same stream. A failure is reported, and is
 * the end for its destination.
 */
async function sendNext(
  all: readonly Served[],
  transfer: Transfer,
  session: Session,
): Promise<void> {
  const { o, source, display } = session;
  const now = wallClock(new Date());
  const outcomes = new Map<Served, PromiseSettledResult<Sent>>();
  for (const served of all) {
    const reason = announce(served, transfer);
    if (reason !== null) outcomes.set(served, { status: "rejected", reason });
  }
  const fitting = all.filter((served) => !outcomes.has(served));
  const receivers = fitting.map(({ destination, todo }): Receiver => ({
    ...destination,
    receive: (from, one) => destination.receive(from, one, todo.length > 1),
  }));
  const results = o.dryRun ? [] : await transferToAll(receivers, source, transfer, display);
  for (const [i, served] of fitting.entries())
    outcomes.set(served, results[i] ?? { status: "fulfilled", value: { bytes: null, seconds: 0 } });
  for (const served of all) {
    const result = outcomes.get(served) as PromiseSettledResult<Sent>;
    try {
      const sent =
        result.status === "fulfilled" ? result.value : await withRoom(served, result.reason, now);
      await noteArrival(served, transfer, sent);
    } catch (error) {
      if (await planAgain(served, error, transfer).catch(() => false)) continue;
      await giveUp(served, error, transfer);
    }
    // Were the run to end early, the next one would take what failed for what was deleted there.
    if (served.destination.stream === null && served.failed.size > 0 && !o.dryRun)
      await remember(served, false).catch(() => {});
  }
}

/** Tells what is sent, and how. Returns why it cannot be sent; null if it can. */
function announce(served: Served, { snapshot, parent }: Transfer): Failure | null {
  const { o, snapshots, display } = served.session;
  const { wanted, standing, todo, free, destination } = served;
  const { name, uuid } = snapshot;
  const why = todo[0]?.why === undefined ? "" : `: ${todo[0].why}`;
  const isRenewal = why === "" && newestShared(snapshots, standing.held) !== null;
  const how = () => {
    if (parent !== null) return `difference to ${parent.name}${why}`;
    if (!o.incremental) return "in full, as asked";
    if (why !== "") return `in full${why}`;
    return isRenewal ? "in full: a new chain" : "in full: no snapshot is on both sides";
  };
  log.info(`${o.dryRun ? "Would send" : "Sending"} ${name} to ${destination.id} (${how()})`);
  if (parent !== null) return null;
  // A new chain of streams is full by design.
  if (!o.full && !isRenewal)
    return new Failure(
      `${name} would be sent in full${why === "" ? ": nothing of it is there" : why}; --no-full forbids it`,
    );
  // Quotas tell how large a full stream is; what is compressed on the way can need less.
  const size = wanted.sending.level === "" ? (display.sizes.get(uuid) ?? 0) : 0;
  const room = Math.max(0, free); // what was sent counts in full, and can have become less on the disk
  if (!o.spaceCheck || size <= room) return null;
  return new NoSpace(
    `${name} takes ${inBytes(size)}, and only ${inBytes(room)} are free there; --skip-space-check tries all the same`,
  );
}

/**
 * Where there was no space for a transfer, deletes what the policy would delete afterwards, and
 * sends once more. Errors: the one that was given, those of a transfer.
 */
async function withRoom(served: Served, error: unknown, now: number): Promise<Sent> {
  const { session, destination, wanted, todo, standing } = served;
  const { snapshots, o, leaps, source, display } = session;
  const going =
    error instanceof NoSpace && o.makeRoom && destination.frozen === null
      ? planRoom(snapshots, standing, todo, wanted.policy, now, leaps)
      : [];
  if (going.length === 0 || o.dryRun) throw error;
  const [transfer] = todo as [Transfer];
  await removeFrom(session, served, going, { reason: "to make room", free: true });
  await destination.discard(transfer.snapshot.name); // there may not have been the space to clear away
  return transferTo(destination, source, transfer, display);
}

async function noteArrival(served: Served, transfer: Transfer, sent: Sent): Promise<void> {
  const { session, destination, wanted, standing } = served;
  const { id } = destination;
  const { snapshot, parent } = transfer;
  served.free -= sent.bytes ?? 0;
  const backup = destination.arrived(transfer);
  served.standing = {
    ...standing,
    held: [...standing.held, backup],
    backups: [...standing.backups, backup],
  };
  served.todo = served.todo.slice(1);
  session.report.event("transfer", {
    destination: id,
    name: snapshot.name,
    parent: parent?.name ?? null,
    ...sent,
  });
  // The record is all the memory of a command: it is written after each stream.
  if (destination.stream !== null) await remember(served, true, snapshot);
  if (standing.chained === null || wanted.sending.fullEvery?.count !== 0) return;
  const { length } = chainOf<Entry>(backup, byUuid(served.standing.held));
  if (length > 100)
    session.report.warning(
      `${id}: to restore ${snapshot.name} takes ${length} streams, each of them whole; --full-every begins a new chain`,
    );
}

/**
 * Plans without the parent of a difference that did not fit to what is there. Returns whether the
 * snapshot is to be sent once more.
 */
async function planAgain(
  served: Served,
  error: unknown,
  { snapshot, parent }: Transfer,
): Promise<boolean> {
  const { session, destination, standing, verdicts } = served;
  const { refused } = verdicts;
  if (!(error instanceof BadParent) || parent === null) return false;
  const find = dataFinder(standing.held);
  const isSecond =
    !refused.has(parent.uuid) && [...refused.values()].some((why) => why.endsWith(DAMAGED));
  // Where a second parent is no better, the snapshot is sent in full.
  const unfit = isSecond ? session.snapshots.filter((one) => find(one) !== undefined) : [parent];
  for (const { uuid, name } of unfit) refused.set(uuid, `the backup of ${name} there ${DAMAGED}`);
  const words = [parent.name, session.o.source.id, destination.id].map(shellWord).join(" ");
  session.report.warning(
    `${destination.id}: ${error.message}; the backup of ${parent.name} there ${DAMAGED}: see "btrfs-backup verify --snapshot ${words}". ${snapshot.name} is sent without it`,
  );
  served.todo = (await planFor(served)).transfers;
  return served.todo[0]?.snapshot === snapshot;
}
const DAMAGED = "seems to be damaged";

/** So many snapshots fail one after the other before it is the place that fails. */
const FAILURES = 3;

/**
 * Reports a snapshot that could not be sent. The destination still gets the later ones, unless the
 * place itself fails.
 */
async function giveUp(
  served: Served,
  error: unknown,
  { snapshot: { name, uuid } }: Transfer,
): Promise<void> {
  const { session, destination, failed, todo } = served;
  const { id } = destination;
  served.complete = false;
  session.report.error(id, error);
  failed.add(uuid);
  served.todo = [];
  const isPlace = error instanceof Absent || error instanceof Stuck || error instanceof Busy;
  // A command is given what is newer than the last that it took: there must be no gap.
  if (isPlace || destination.stream !== null || failed.size >= FAILURES || todo.length < 2) return;
  log.info(
    `${id}: the next ones are sent without ${name}, which the next run tries again; if it can never be sent, delete it: btrfs subvolume delete ${shellWord(join(session.source.path, name))}`,
  );
  served.todo = await planFor(served).then(
    ({ transfers }) => transfers,
    () => [],
  );
}

/** Ends the service of a destination. */
async function conclude(served: Served): Promise<void> {
  const { destination, wanted, complete } = served;
  const { o, report } = served.session;
  const isServed = o.transfer && complete;
  try {
    await destination.settle?.();
    if (isServed && wanted.sending.resume && !o.dryRun) await destination.tidy();
    // Before anything is deleted there: were the run to end, the source would go by an old pin.
    if (destination.stream === null) await remember(served, isServed);
    served.done = complete;
  } catch (error) {
    report.error(destination.id, error);
  }
  served.pruning = pruneServed(served);
  served.pruning.catch(() => {}); // its error is told when all are done
}

/** Writes down what a destination shares with the source now; `isServed`: it has all it should. */
async function remember(
  { session, destination, standing, verdicts, failed, earlier }: Served,
  isServed: boolean,
  pin: Memory | null = newestShared(session.snapshots, standing.held),
): Promise<void> {
  const { snapshots, known } = session;
  const { id, filesystem } = destination;
  const find = dataFinder(standing.held);
  const lacking = snapshots
    .filter((one) => (failed.has(one.uuid) || earlier.has(one.uuid)) && find(one) === undefined)
    .map(({ uuid }) => uuid);
  if (pin !== null || known.has(id))
    known.set(id, {
      location: id,
      filesystem,
      pin: pin && { name: pin.name, uuid: pin.uuid },
      last: isServed ? new Date().toISOString() : (known.get(id)?.last ?? null),
      ...(lacking.length === 0 ? {} : { failed: lacking }),
      ...clearedOf(snapshots, verdicts.cleared),
    });
  await save(session);
}

/** What a record says of changed and compared snapshots, as long as they are there. */
function clearedOf(
  snapshots: readonly Pick<Entry, "uuid">[],
  cleared: Cleared,
): Pick<KnownDestination, "cleared"> {
  const left = Object.entries(cleared).filter(([uuid]) =>
    snapshots.some((one) => one.uuid === uuid),
  );
  return left.length === 0 ? {} : { cleared: Object.fromEntries(left) };
}

// ── run: pruning ──

/** What pruning goes by; a session, or less where there is no source. */
type Pruning = Pick<Session, "report" | "snapshots" | "leaps"> & {
  readonly o: Pick<RunOptions, "dryRun">;
};

/** Prunes the source while the destinations are pruned, and waits for all. */
async function pruneAll(all: readonly Served[], session: Session): Promise<void> {
  const { report, source, known } = session;
  // A full disk can keep the record from being written: then the old one holds as well.
  const isSaved = await save(session).then(
    () => true,
    (error) => (report.error(null, error), false),
  );
  const remembered = [...known.values(), ...(isSaved ? [] : (source.chain.destinations ?? []))];
  await allOf([
    ...(source.record.unreadable === null ? [pruneSource(session, remembered, all)] : []),
    ...all.map(({ pruning }) => pruning),
  ]);
  if (!isSaved) await save(session);
}

/** With less of its space free, a source does not keep all that is still to be sent. */
const LOW = 0.05;

/** Keeps at the source what its policy, and every destination's next transfer, needs. */
async function pruneSource(
  session: Session,
  remembered: readonly KnownDestination[],
  all: readonly Served[],
): Promise<void> {
  const { o, report, source, snapshots, leaps } = session;
  const { id } = o.source;
  const claimants = claimantsOf(session, remembered, all);
  const decide = (full: boolean) =>
    planSource(snapshots, o.sourcePolicy, claimants, wallClock(new Date()), {
      adopted: leaps ?? [],
      full,
    });
  const decisions = decide(source.place.free < LOW * source.place.size);
  const stays = decide(false);
  const lost = decisions
    .filter(({ reasons }, i) => reasons.length === 0 && stays[i]?.reasons.length !== 0)
    .map(({ entry }) => entry.name);
  if (lost.length > 0)
    report.warning(
      `less than ${100 * LOW} % of the filesystem of ${id} is free: of the snapshots that are kept to be sent, the oldest go: ${lost.join(" ")}`,
    );
  warnOfLeap(decisions, id, report);
  for (const [unsent, { count: many, oldest }] of unsentIn(decisions)) {
    const last = remembered.find(({ location }) => location === unsent)?.last;
    report.warning(
      `${unsent}: ${count(many, "snapshot")} stay${many === 1 ? "s" : ""} at the source for it, since ${oldest} (${last ? `last served ${last}` : "never served"}); ways out: send them; --drop-unsent; --optional ${shellWord(unsent)}; btrfs-backup unpin ${shellWord(id)} ${shellWord(unsent)}`,
    );
  }
  const going = explained(decisions, id, o.dryRun);
  const names = going.map(({ name }) => name);
  const reason = `not kept by "${o.sourcePolicy?.text}"`;
  await removing(session, id, { names, reason }, async () => {
    await deleteFrom(source, going, o.deletion);
    await Promise.all(all.map(({ pruning }) => pruning)); // their errors are told first
  });
  const place = placeIn(report.places, null);
  place.kept = snapshots.length - names.length;
  place.deleted += names.length;
}

/**
 * The remembered destinations and the new ones as retention at the source sees them. One that is
 * remembered twice has two pins.
 */
function claimantsOf(
  { o, wanted }: Session,
  remembered: readonly KnownDestination[],
  all: readonly Served[],
): Claimant[] {
  const isNew = (id: string) => !remembered.some(({ location }) => location === id);
  const claims: readonly Pick<KnownDestination, "location" | "pin" | "failed">[] = [
    ...remembered,
    ...[...wanted.keys()].filter(isNew).map((location) => ({ location, pin: null })),
  ];
  const claimants = claims.map(({ location: id, pin, failed }) => {
    const given = wanted.get(id);
    if (given === undefined) return { id, pin, failed, unread: false, unsentPolicy: null };
    const { policy, optional } = given;
    const served = all.find(({ destination }) => destination.id === id);
    const unread = served === undefined || (served.destination.stream !== null && !served.done);
    const isKept = !served?.complete && (o.keepUnsent || !(o.dropUnsent || optional));
    return { id, pin, failed, unread, unsentPolicy: isKept ? { policy } : null };
  });
  return o.removeLocks ? claimants.filter(({ pin }) => pin) : claimants;
}

/** Prunes a destination that has all it should have, and notes what was done there. */
async function pruneServed(served: Served): Promise<void> {
  const { session, destination, began } = served;
  const { report } = session;
  try {
    if (served.done) await pruneDestination(session, served);
  } catch (error) {
    report.error(destination.id, error);
  }
  const place = placeIn(report.places, destination.id);
  place.seconds += (Date.now() - began) / 1000;
  if (destination.stream === null) place.kept = served.standing.backups.length;
}

/** Deletes what a destination's policy does not keep. */
async function pruneDestination(
  pruning: Pruning,
  served: Pick<Served, "destination" | "standing"> & { readonly wanted: Pick<Wanted, "policy"> },
  now = wallClock(new Date()),
): Promise<void> {
  const { destination, wanted, standing } = served;
  const { o, report, snapshots, leaps } = pruning;
  const { id, frozen } = destination;
  if (destination.stream !== null) return;
  if (frozen !== null) throw new Failure(`nothing is deleted there: ${frozen}`);
  const decisions = planDestination(snapshots, standing, wanted.policy, now, leaps);
  warnOfLeap(decisions, id, report);
  const reason = `not kept by "${wanted.policy?.text}"`;
  await removeFrom(pruning, served, explained(decisions, id, o.dryRun), { reason, free: false });
}

/** Deletes backups of a destination; `free`: waits until their space is free. */
async function removeFrom(
  pruning: Pruning,
  served: Pick<Served, "destination" | "standing">,
  backups: readonly Backup[],
  { reason, free }: { readonly reason: string; readonly free: boolean },
): Promise<void> {
  const { destination } = served;
  const { id } = destination;
  const ordered = deletionOrder(backups, served.standing);
  const names = ordered.map(({ name }) => name);
  await removing(pruning, id, { names, reason }, () => destination.remove(ordered, free));
  placeIn(pruning.report.places, id).deleted += names.length;
  const gone = new Set(ordered.map(({ uuid }) => uuid));
  const stays = ({ uuid }: Subvolume) => !gone.has(uuid);
  const { held, backups: ours } = served.standing;
  served.standing = {
    ...served.standing,
    held: held.filter(stays),
    backups: ours.filter(stays),
  };
}

async function removing(
  { o: { dryRun }, report }: Pick<Pruning, "o" | "report">,
  location: string,
  { names, reason }: { readonly names: readonly string[]; readonly reason: string },
  remove: () => Promise<void>,
): Promise<void> {
  if (names.length === 0) return;
  log.info(
    `${dryRun ? "Would delete" : "Deleting"} ${names.length} at ${location}: ${someOf(names, 5, " ")} (${reason})`,
  );
  if (!dryRun) await remove();
  for (const name of names) report.event("delete", { location, name, reason });
}

/** Tells what retention decided, and returns what goes. */
function explained<T extends Dated>(
  decisions: readonly Decision<T>[],
  id: string,
  dryRun: boolean,
): T[] {
  const tell = dryRun ? log.info : log.debug;
  for (const { entry, reasons } of dryRun || log.level >= LEVELS.debug ? decisions : [])
    tell(`${id}: ${entry.name} ${reasons.length > 0 ? `stays: ${reasons.join(", ")}` : "goes"}`);
  return decisions.filter(({ reasons }) => reasons.length === 0).map(({ entry }) => entry);
}

/** Warns that nothing is deleted where the clock leapt. */
function warnOfLeap(decisions: readonly Decision<Dated>[], id: string, report: Report): void {
  const to = leaptTo(decisions);
  if (to !== null)
    report.warning(
      `${id}: nothing is deleted by hours to years, since the clock leapt to ${to}: is it right? It is believed as soon as there is something of ${BELIEVED.days} days from then on, or by --adopt-clock`,
    );
}

// ── run: telling what was done ──

/** Tells what a run did. */
function concludeRun(
  { dryRun, source }: Pick<RunOptions, "dryRun" | "source">,
  report: Report,
  name: string | null,
): void {
  const { snapshot = 0, transfer = 0, delete: deletions = 0 } = report.tally;
  log.info(
    `${dryRun ? "Nothing was changed" : "Done"}: ${count(snapshot, "snapshot")}, ${count(transfer, "transfer")}, ${count(deletions, "deletion")}${report.failed ? ", with errors" : ""}\n${summaryOf(source.id, report.places)}`,
  );
  report.event("summary", { ok: !report.failed, snapshot: name, transfers: transfer, deletions });
}

/** What a run did at the source (`last` is null there), or at a destination. */
export type PlaceMetrics = {
  sent: number;
  bytes: number;
  seconds: number;
  deleted: number;
  errors: number;
  kept: number | null;
  last: string | null;
};

/** What was done at each place, the source first. */
export function summaryOf(
  source: string,
  places: ReadonlyMap<string | null, PlaceMetrics>,
): string {
  const rows = [...places]
    .sort(([a], [b]) => Number(b === null) - Number(a === null))
    .map(([id, { sent, bytes, seconds, deleted, kept, errors }]) => [
      id ?? source,
      ...(id === null ? ["", ""] : [String(sent), inBytes(bytes)]),
      `${seconds.toFixed(1)} s`,
      String(deleted),
      kept === null ? "" : String(kept),
      errors > 0 ? "failed" : "",
    ]);
  return table([["", "sent", "bytes", "time", "deleted", "kept", ""], ...rows]).trimEnd();
}

/** Columns as wide as their widest cell. */
export function table(rows: readonly (readonly string[])[]): string {
  const shown = rows.map((row) => row.map(visible));
  const widths: number[] = [];
  for (const row of shown)
    for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, cell.length);
  const line = (row: readonly string[]) =>
    row
      .map((cell, i) => cell.padEnd(widths[i] ?? 0))
      .join("  ")
      .trimEnd();
  return shown.map((row) => `${line(row)}\n`).join("");
}

/** Prometheus' text format: what its node exporter's textfile collector reads. */
export function metricsOf(
  source: string,
  places: ReadonlyMap<string | null, PlaceMetrics>,
  now: number,
): string {
  const label = (text: string) =>
    visible(text).replace(/["\\\n]/g, (c) => (c === "\n" ? "\\n" : `\\${c}`));
  const all = [...places].map(([id, place]) => ({
    labels: `{source="${label(source)}"${id === null ? "" : `,destination="${label(id)}"`}}`,
    isSource: id === null,
    ...place,
  }));
  type One = (typeof all)[number];
  const metric = (name: string, help: string, value: (place: One) => number | null) => {
    const lines = all
      .map((place) => [place.labels, value(place)] as const)
      .filter(([, number]) => number !== null && !Number.isNaN(number))
      .map(([labels, number]) => `btrfs_backup_${name}${labels} ${number}\n`);
    return lines.length === 0
      ? ""
      : `# HELP btrfs_backup_${name} ${help}\n# TYPE btrfs_backup_${name} gauge\n${lines.join("")}`;
  };
  const succeeded = ({ last, isSource }: One) => {
    if (last !== null) return Date.parse(last) / 1000;
    return isSource ? null : 0;
  };
  return [
    metric(
      "last_success_timestamp_seconds",
      "When the destination last had all that it should have.",
      succeeded,
    ),
    metric("errors", "How many things went wrong in the last run.", ({ errors }) => errors),
    metric("sent_bytes", "Bytes sent in the last run.", ({ bytes }) => bytes),
    metric("duration_seconds", "How long the last run took there.", ({ seconds }) => seconds),
    metric("snapshots", "Snapshots or backups kept.", ({ kept }) => kept),
    metric("last_run_timestamp_seconds", "When the last run ended.", () => now / 1000),
  ].join("");
}

/**
 * Replaces a file. Nobody reads half of it, and after a power cut it has one of both contents.
 * Errors: Failure.
 */
async function writeMetrics(file: string, text: string): Promise<void> {
  await ask(LOCAL, METRICS, { file }, `--metrics: cannot write ${file}`, text);
}

/** Sends backups on, prefix by prefix: what `run` does from a source, with a folder of backups in its place. */
export async function copy(
  { prefix, ...o }: Omit<RunOptions, "prefix"> & { readonly prefix: string | null },
  report: Report,
): Promise<void> {
  const first = await openLocation(o.source, { ...o, prefix: prefix ?? "", wait: "look" });
  const prefixes = prefix === null ? prefixesIn(first.standing) : [prefix];
  const isSource = (one: string) => isSnapshotFolder(withPrefix(first, one));
  const isOne = `has snapshots of a source: "btrfs-backup run --no-snapshot" sends these`;
  if ([first.prefix, ...prefixes].every(isSource)) throw new UsageError(`${o.source.id} ${isOne}`);
  if (prefixes.length === 0) throw new Failure(`there are no backups in ${o.source.id}`);
  const options = { ...o, snapshotFolder: "." };
  checkPlaces(options);
  for (const one of prefixes)
    try {
      if (isSource(one)) throw new Failure(`the prefix ${JSON.stringify(one)} ${isOne}`);
      await persistently({ ...options, prefix: one }, report, async (o, report) => {
        const open = async () => {
          const folder = await openFolder(o.source, o.source.path, {
            prefix: one,
            wait: o.dryRun ? "look" : o.wait,
            hosts: o.hosts,
          });
          // Whose the backups are goes with them, so that their source can go on in the copy.
          const identity = folder.chain.owner ?? {
            uuid: `${folder.place.filesystem}${folder.top}`,
            host: folder.hostName,
            path: folder.path,
          };
          return {
            ...folder,
            snapshots: wholeIn(folder),
            identity,
            subvolume: folder.path,
            owned: folder.chain,
          };
        };
        await backUp(open, o, report);
      });
    } catch (error) {
      if (prefixes.length === 1 || error instanceof UsageError) throw error;
      report.error(o.source.id, error); // the other prefixes can still be copied
    }
  if (prefixes.length > 1) for (const place of report.places.values()) place.kept = null; // it is that of the last one
  concludeRun(o, report, null);
}

export type PruneOptions = ReturnType<typeof pruneOptions>;

/** Deletes from a place of backups what a policy does not keep, without its source. */
export async function prune(o: PruneOptions, report: Report): Promise<void> {
  const first = await openLocation(o.location, { ...o, prefix: o.prefix ?? "", wait: "look" });
  const prefixes = o.prefix === null ? prefixesIn(first.standing) : [o.prefix];
  const isSource = (prefix: string) => isSnapshotFolder(withPrefix(first, prefix));
  const isOne = `has snapshots of a source: "btrfs-backup run --no-snapshot --no-transfer -N …" prunes these`;
  if ([first.prefix, ...prefixes].every(isSource))
    throw new UsageError(`${o.location.id} ${isOne}`);
  // One look for all prefixes; only where something is to be done is one opened once more, and locked.
  const all = prefixes.flatMap((prefix) => withPrefix(first, prefix).snapshots);
  const arriving = arrivals(first, all);
  arriving.catch(() => {});
  const now = wallClock(new Date());
  for (const prefix of prefixes) {
    const looked = withPrefix(first, prefix);
    let folder = looked;
    try {
      if (isSource(prefix)) throw new Failure(`the prefix ${JSON.stringify(prefix)} ${isOne}`);
      // Something may have gone in this moment: then each is asked for by itself.
      const arrived = await arriving.catch(() => null);
      let pruning = arrived === null ? null : pruningOf(looked, o, arrived, now);
      if (pruning === null || !(o.dryRun || pruning.isIdle)) {
        folder = await openFolder(o.location, o.location.path, {
          prefix,
          wait: o.dryRun ? "look" : o.wait,
          hosts: o.hosts,
        });
        pruning = pruningOf(folder, o, await arrivals(folder, folder.snapshots), now);
        if (pruning.isNews && !o.dryRun) await writeRecord(folder, pruning.chain);
      }
      const { leaps } = pruning;
      const wanted = { policy: o.policy };
      await pruneDestination({ o, report, snapshots: [], leaps }, { ...pruning, wanted }, now);
    } catch (error) {
      report.error(o.location.id, error); // the other prefixes can still be pruned
    } finally {
      if (folder !== looked) await whileCleaning(folder.close);
    }
  }
  const { delete: deletions = 0 } = report.tally;
  log.info(
    `${o.dryRun ? "Nothing was changed" : "Done"}: ${count(deletions, "deletion")}${report.failed ? ", with errors" : ""}`,
  );
  report.event("summary", { ok: !report.failed, deletions });
}

const NO_SENDING: Sending = {
  level: "",
  recipients: [],
  rate: null,
  protocol: null,
  fullEvery: null,
  resume: false,
  spaceCheck: true,
  trust: false,
};

/** A place of backups without a source: in a store, of all that the newest stream's source calls its own. */
function pruned(folder: Folder, o: PruneOptions): Destination {
  const { store, prefix, id, chain } = folder;
  needRoot(folder, "pruning");
  const again = () => openFolder(o.location, folder.path, { prefix, wait: "look", hosts: o.hosts });
  if (store === null)
    return folderDestination(folder, again, chain, [], {
      ...o.deletion,
      btrfsDebug: false,
      sending: NO_SENDING,
    });
  const ours = store.streams.filter(({ name }) => parseName(name, prefix) !== null);
  const owner = ours.at(-1)?.owner ?? ownerOf({ uuid: "", host: "", path: "" });
  return storeDestination(
    folder,
    store,
    again,
    standingInStore(store, prefix, lineagesOf(ours, owner, [])),
    owner,
    lockFile(`${id}\n${prefix}`),
    NO_SENDING,
  );
}

/**
 * When backups arrived, by UUID, as far as their place tells: whoever may only add backups can give them any name, but not any time. Three
 * processes at most, whatever their number, but for what neither btrfs-progs nor the kernel tells in a list. Errors: Failure.
 */
async function arrivals(folder: Folder, entries: readonly Entry[]): Promise<Map<string, number>> {
  const { host, id, store, alone, written } = folder;
  if (store !== null)
    return new Map(
      entries.flatMap(({ path, uuid }) =>
        written.has(path) ? [[uuid, written.get(path) as number]] : [],
      ),
    );
  const place = at(folder);
  const cannot = `${id}: cannot tell when backups were received`;
  const arrived = new Map<string, number>();
  const lacking = () => entries.filter(({ uuid }) => !arrived.has(uuid));
  // sudo does not pass the time zone on.
  const listed =
    alone || host.sudo ? "" : (await ask(host, MADE, place, cannot)).replace(/\n$/, "");
  for (const [, date, time, uuid = ""] of listedLines(listed, LISTED_MADE))
    if (date !== undefined) arrived.set(uuid, Date.parse(`${date}T${time}Z`));
  const byName = (some: readonly Entry[]) =>
    new Map(some.map(({ name, uuid }) => [`./${name}`, uuid]));
  const full = byName(lacking().filter(({ parentUuid }) => parentUuid === null));
  for (const names of chunks([...full.keys()]))
    for (const [, seconds, name = ""] of (
      await ask(host, BORN, { ...place, names }, cannot)
    ).matchAll(/^([1-9]\d*) (.*)$/gm))
      arrived.set(full.get(name) ?? "", Number(seconds) * 1000);
  const others = byName(lacking());
  for (const names of chunks([...others.keys()]))
    for (const [, name = "", date, time, zone] of (
      await ask(host, RECEIVED, { ...place, names }, cannot)
    ).matchAll(/^(\.\/.*)\n\s+Creation time:\s+(\S+) (\S+) ([+-]\d{4})$/gm))
      arrived.set(others.get(name) ?? "", Date.parse(`${date}T${time}${zone}`));
  return arrived;
}

/** Backups in the order of their arrival, dated by it. Errors: Failure for one of which it is not known. */
function asReceived(
  { id, store }: Pick<Folder, "id" | "store">,
  backups: readonly Backup[],
  arrived: ReadonlyMap<string, number>,
): Backup[] {
  let last = -Infinity;
  return [...backups]
    .sort((a, b) => a.id - b.id)
    .map((backup) => {
      const received = arrived.get(backup.uuid);
      if (received === undefined && store?.verbs !== RCLONE)
        throw new Failure(`${id}: it is not known when ${backup.name} was received`);
      // The order of arrival is that of IDs, whatever the clock did.
      return received === undefined
        ? backup
        : {
            ...backup,
            time: wallClock(new Date(received)),
            moment: store === null ? (last = Math.max(last, received)) : received,
          };
    });
}

/** What there is to prune of one prefix. */
function pruningOf(
  folder: Folder,
  o: PruneOptions,
  arrived: ReadonlyMap<string, number>,
  now: number,
) {
  const destination = pruned(folder, o);
  const { backups } = destination.standing;
  const standing = {
    ...destination.standing,
    backups: asReceived(folder, backups, arrived),
    ...(backups.some(({ belated }) => belated) ? { newest: backups.at(-1)?.uuid } : {}),
  };
  const leaps = o.adoptClock
    ? leapNames([standing.backups], folder.chain.leaps)
    : folder.chain.leaps;
  const chain = { ...folder.chain, ...(leaps === undefined ? {} : { leaps }) };
  const isNews =
    folder.store === null && folder.record.unreadable === null && !sameRecord(chain, folder.chain);
  const goes = () =>
    planDestination([], standing, o.policy, now, leaps).some(({ reasons }) => reasons.length === 0);
  return {
    destination,
    standing,
    leaps: leaps ?? [],
    chain,
    isNews,
    isIdle: !isNews && destination.frozen === null && !goes(),
  };
}

export type RestoreOptions = ReturnType<typeof restoreOptions>;

/** The snapshot that is asked for. Errors: Failure telling what there is. */
function choose(
  location: Folder,
  { snapshot, before: until }: Pick<RestoreOptions, "snapshot" | "before">,
): Snapshot {
  const whole = wholeIn(location);
  const stored = location.store?.streams.filter((stream) => stream.stored);
  // A stored stream that lacks what it builds on is not passed over in silence.
  const all = stored === undefined ? whole : snapshotsAmong(stored, location.prefix, null);
  const alike = stored?.filter((stream) => stream.readonly && stream.name === snapshot) ?? [];
  if (new Set(alike.map(({ receivedUuid }) => receivedUuid)).size > 1)
    throw new Failure(
      `${location.id} has several snapshots ${snapshot}; --snapshot takes these names as well: ${alike.map(({ uuid }) => uuid).join(" ")}`,
    );
  const named = location.standing.find(
    (entry) =>
      entry.name === snapshot && (isSnapshotFolder(location) ? entry.readonly : isComplete(entry)),
  );
  const found =
    snapshot === null
      ? all.findLast(({ time }) => time <= (until ?? Infinity))
      : (all.findLast(
          ({ name, path }) => name === snapshot || (stored !== undefined && path === snapshot),
        ) ??
        (named && { ...named, time: 0, moment: 0 }));
  if (found !== undefined && stored !== undefined && !found.readonly)
    throw new Failure(
      `${location.id}: ${found.name} cannot be restored: ${missingFor(found, location)}; ${instead(location, whole)}`,
    );
  if (found !== undefined) return found;
  const range =
    whole.length === 0
      ? "nothing complete"
      : `${count(whole.length, "snapshot")} from ${whole[0]?.name} to ${whole.at(-1)?.name}`;
  const what =
    snapshot !== null
      ? `no complete snapshot ${snapshot}`
      : until !== null
        ? `nothing from that time or before`
        : "nothing to restore";
  const unsummed = (location.store?.streams.length ?? 0) - (stored?.length ?? 0);
  const hint =
    unsummed > 0
      ? ` (${count(unsummed, "stream")} without a checksum object: --unverified restores what there is)`
      : location.store === null &&
          parseStreams(
            [...location.entries].map((name) => ({ name, bytes: 0 })),
            true,
          ).streams.length > 0
        ? ` (there are stored streams in it: raw${location.host.ssh === null ? "://" : "+"}${location.id})`
        : location.store === null && location.place.filesystem === null
          ? " (it is not on btrfs)"
          : "";
  throw new Failure(`${location.id}: ${what}; it has ${range}${hint}`);
}

/** What a stored stream lacks. */
function missingFor({ uuid }: Subvolume, { store }: Folder): string {
  const streams = store?.streams ?? [];
  let lacking = streams.find((stream) => stream.uuid === uuid) as Stream;
  const seen = new Set([lacking.uuid]);
  for (
    let above;
    (above = streams.find(
      (stream) => stream.stored && stream.receivedUuid === lacking.from && !seen.has(stream.uuid),
    )) !== undefined;
    seen.add(above.uuid)
  )
    lacking = above;
  const half = streams.find((stream) => !stream.stored && stream.receivedUuid === lacking.from);
  return half !== undefined
    ? `${half.uuid} has no checksum object`
    : `the stream that ${lacking.uuid} builds on, ${lacking.from}, is missing`;
}

/** What to restore where something else cannot be. */
const instead = (location: Folder, whole: readonly Snapshot[]) =>
  whole.length === 0
    ? `nothing else in ${location.id} can be restored`
    : `the newest that can be restored without it: --snapshot ${shellWord(whole.at(-1)?.name as string)}`;

/** Where a subvolume is restored to: the folder that it will stand in, its name and path there, and what has that name now. */
type Target = Folder & {
  readonly name: string;
  readonly full: string;
  readonly existing: Subvolume | null;
  readonly inside: string | null;
};

/** Looks at TARGET. Errors: Failure saying why it cannot be one, and what to do instead. */
async function openTarget(o: RestoreOptions, prefix: string): Promise<Target> {
  const { id, path } = o.target;
  const parent = await openFolder(o.target, dirname(path), {
    prefix,
    wait: "look",
    hosts: o.hosts,
  });
  const name = basename(path);
  const full = join(parent.path, name);
  const mount = parent.mounts.findLast((one) => one.path === full);
  if (mount !== undefined) throw new Failure(mountAdvice(o.words, full, mount));
  if (!parent.exists) throw new Failure(`no such directory: ${parent.path}`);
  if (parent.place.filesystem === null) throw new Failure(`${parent.path} is not on btrfs`);
  needRoot(parent, "restoring");
  // Under sudo is only btrfs: files of others are in the way.
  needRoot(
    { ...parent, alone: parent.host.sudo && parent.user !== "0" },
    "restoring: --sudo is not enough;",
  );
  const existing =
    parent.subvolumes.find((subvolume) => `/${subvolume.path}` === join(parent.top, name)) ?? null;
  if (parent.entries.has(name) && existing === null)
    throw new Failure(`${id} exists, and is not a subvolume`);
  if (existing !== null && !o.replace)
    throw new Failure(
      `${id} exists; --replace gives its name to the restored subvolume, and keeps the old one beside it`,
    );
  const below = parent.mounts.find((one) => isWithin(one.path, full));
  if (below !== undefined)
    throw new Failure(
      `${below.path} is a mount point below ${id}, which would be moved away with it: unmount it first`,
    );
  const folder = resolve(path, o.snapshotFolder);
  if (folder === path) throw new UsageError("the snapshot folder cannot be TARGET itself");
  return {
    ...parent,
    name,
    full,
    existing,
    inside: isWithin(folder, path) ? folder.slice(path.length + 1) : null,
  };
}

const samePlace = (a: Folder, b: Folder) =>
  a.hostName === b.hostName && a.place.filesystem === b.place.filesystem && a.top === b.top;

/** The snapshot folder of TARGET where that is not inside it, locked: it may be LOCATION itself. */
async function openOutside(target: Target, location: Folder, o: RestoreOptions): Promise<Folder> {
  const opening = { prefix: location.prefix, wait: "look" as const, hosts: o.hosts };
  const check = (folder: Folder) => {
    if (folder.place.filesystem !== target.place.filesystem)
      throw new UsageError(
        `the snapshot folder ${folder.path} is not on the filesystem of ${o.target.id}`,
      );
    const known = dataFinder(wholeIn(location));
    const claimed = claim(
      { uuid: "", host: target.hostName, path: target.full },
      folder.chain,
      folder.snapshots,
      folder.snapshots.filter((s) => known(s)),
      false,
    );
    if (!claimed.accepted) throw new Failure(`${folder.path}: ${claimed.why}`);
  };
  // Not by another host's word.
  const isLocation = (folder: Folder) =>
    sameHost(folder.host, location.host) && samePlace(folder, location);
  const path = resolve(o.target.path, o.snapshotFolder);
  const seen = await openChecked(
    o.target,
    path,
    opening,
    (folder) => void (isLocation(folder) || check(folder)),
  );
  if (isLocation(seen)) return location;
  return o.dryRun ? seen : openChecked(o.target, path, { ...opening, wait: o.wait }, check);
}

/** What FINISH printed: where the snapshots are to be, and what could not move there. Errors: Failure for any other shape. */
function parseFinished(printed: string): { to: string; stuck: readonly string[] } {
  const [to = "", stuck = "", end, ...rest] = printed.split("\n");
  if (end !== "end" || rest.join() !== "")
    throw new Failure(`cannot read what was printed of a restore's end: ${printed}`);
  return { to, stuck: stuck.split("/").filter(Boolean) };
}

/** What to say where a restore broke when names had begun to change. */
async function howFar(
  target: Target,
  work: string,
  before: string,
  left: string,
  problem: string,
  o: RestoreOptions,
): Promise<string> {
  const now = await openFolder(o.target, target.path, {
    prefix: target.prefix,
    wait: "look",
    hosts: o.hosts,
  });
  const stands = (name: string) =>
    now.subvolumes.some(({ path }) => `/${path}` === join(now.top, name));
  if (stands(`${work}/tree`) || !stands(target.name))
    return `${problem} (${now.entries.has(work) ? "the next run or restore goes on with it" : "nothing was changed"})`;
  return `it is restored, but not all of its snapshots have moved from ${before === "" ? left : join(target.path, before)}; the next run or restore moves them: ${problem}`;
}

/** Goes on with restores to a path that were interrupted when names had begun to change. Errors: Failure, Busy. */
async function finishRestores(location: Readable, path: string, hosts: Hosts): Promise<void> {
  const opening = { prefix: "", wait: "look" as const, hosts };
  const folder = await openFolder(location, dirname(path), opening);
  for (const work of leftoversOf(basename(path), folder).keys()) {
    const finished = await whileCleaning(() =>
      ask(
        folder.host,
        FINISH,
        { ...at(folder), work, how: "" },
        `cannot finish what an interrupted restore of ${path} began`,
      ),
    );
    if (finished === "") continue;
    const { to, stuck } = parseFinished(finished);
    log.info(`Finished the restore of ${path} that was interrupted`);
    if (stuck.length > 0)
      throw new Failure(
        `${path} is restored, but these snapshots could not move to ${to}: ${stuck.join(" ")}`,
      );
    // What was replaced by its copy on the way has another UUID.
    const moved = await openFolder(location, to, opening);
    const uuids = new Map<string, string>(moved.standing.map(({ name, uuid }) => [name, uuid]));
    for (const [prefix, chain] of moved.record.chains) {
      const destinations = (chain.destinations ?? []).map((known) =>
        known.pin === null || moved.subvolumes.some(({ uuid }) => uuid === known.pin?.uuid)
          ? known
          : { ...known, pin: { ...known.pin, uuid: uuids.get(known.pin.name) ?? known.pin.uuid } },
      );
      if (chain.destinations !== undefined && !sameRecord(chain, { ...chain, destinations }))
        await writeRecord({ ...moved, prefix }, { ...chain, destinations });
    }
  }
}

/** Removes what interrupted restores to TARGET left; `only`: of those one directory. Errors: Busy while it is still at work. */
async function clearLeftovers(
  target: Target,
  only: string | null,
  o: RestoreOptions,
): Promise<void> {
  const now =
    only === null
      ? target
      : await openFolder(o.target, target.path, {
          prefix: target.prefix,
          wait: "look",
          hosts: o.hosts,
        });
  for (const [name, paths] of leftoversOf(target.name, now)) {
    if (only !== null && name !== only) continue;
    if (only === null)
      log.info(
        `${o.dryRun ? "Would remove" : "Removing"} what an interrupted restore left: ${join(target.path, name)}`,
      );
    const idOf = new Map(now.subvolumes.map(({ path, id }) => [`/${path}`, id]));
    const ids = paths.flatMap((path) => idOf.get(join(now.top, name, path)) ?? []).join(" ");
    if (!o.dryRun)
      await ask(
        target.host,
        CLEAR,
        { ...at(target), work: name, ids, paths },
        `cannot remove ${join(target.path, name)}, which an interrupted restore left`,
      );
  }
}

/** The mount that TARGET is seen through, and the path below it of what has a path from the filesystem's top level. */
function throughMount(target: Target): { mount: Mount; through: (top: string) => string } {
  const { mount } = placeOn(target.mounts, target.path);
  return {
    mount,
    through: (top) => join(mount.path, top.slice(mount.root.length === 1 ? 0 : mount.root.length)),
  };
}

/** Whether a location is on the filesystem of TARGET, here: another host's word for being this one would let it choose what is moved here. */
const isHere = (location: Folder, target: Target) =>
  sameHost(location.host, target.host) &&
  location.hostName === target.hostName &&
  location.place.filesystem === target.place.filesystem;

/** What a receive of LOCATION's could build on where it is restored; `edited`: the UUIDs of what it could not, since it may have been changed. Errors: Failure. */
type Ground = { readonly there: readonly Subvolume[]; readonly edited: ReadonlySet<string> };
async function groundOf(
  location: Folder,
  target: Target,
  outside: Folder | null,
  asked: Folder | null,
  o: RestoreOptions,
): Promise<Ground> {
  const { mount, through } = throughMount(target);
  const folders =
    asked !== null
      ? [asked.top]
      : [target.top, outside?.top ?? join(target.top, target.name, target.inside ?? "")];
  const there = target.subvolumes.filter(
    ({ path, readonly }) =>
      readonly && folders.includes(dirname(`/${path}`)) && isWithin(`/${path}`, mount.root),
  );
  const edited = new Set<string>();
  const held = dataFinder(location.standing);
  const taken = isHere(location, target)
    ? []
    : there.filter(
        (one) =>
          held(one) !== undefined && changedSince(one, { ctransids: new Map() }, {}) === undefined,
      );
  for (const [directory, some] of groupBy(taken, ({ path }) => dirname(`/${path}`))) {
    const folder = await openFolder(o.target, through(directory), {
      prefix: location.prefix,
      wait: "look",
      hosts: o.hosts,
    });
    const inquiry = inquiryInto(folder);
    await learn(
      inquiry,
      some.map((one) => ({ ...one, name: basename(one.path) as EntryName, moment: null })),
      [],
    );
    const cleared =
      folder.chain.destinations?.find((known) => known.location === location.id)?.cleared ?? {};
    for (const one of some) if (changedSince(one, inquiry, cleared)) edited.add(one.uuid);
  }
  if (edited.size > 0)
    log.info(
      `${o.target.id}: ${count(edited.size, "snapshot")} there may have been edited, and nothing is built on ${edited.size === 1 ? "it" : "them"}; "btrfs-backup verify" tells, and clears`,
    );
  return { there: there.filter(({ uuid }) => !edited.has(uuid)), edited };
}

/** Decides what is there already, what is sent, and what moves. Errors: Failure or UsageError for what cannot be done, before anything is changed. */
function decideRestore(
  location: Folder,
  chosen: Snapshot,
  target: Target,
  outside: Folder | null,
  { there, edited }: Ground,
  fitness: Fitness,
  o: RestoreOptions,
) {
  const { mount, through } = throughMount(target);
  const here = isHere(location, target);
  const own = here && isSnapshotFolder(location);
  // NAME, where its own data has that name already.
  const standing =
    outside?.standing.find(({ name, readonly }) => name === chosen.name && readonly) ?? null;
  const named =
    standing !== null &&
    (standing.uuid === chosen.uuid || dataFinder([standing])(chosen) !== undefined);
  const stands = named && !edited.has(standing.uuid);
  if (!named && (outside?.entries.has(chosen.name) ?? false))
    throw new Failure(`${outside?.path} has something else by the name of ${chosen.name}`);
  const { present, parent, why }: RestorePlan = stands
    ? { present: standing, parent: null }
    : here
      ? { present: chosen, parent: null }
      : planRestore(chosen, wholeIn(location), there, fitness);
  const pieces =
    location.store === null || present !== null
      ? []
      : planPieces(chainOf(chosen as Entry as Stream, byUuid(location.store.streams)), there);
  const origin =
    present === null
      ? ""
      : stands
        ? join((outside as Folder).path, chosen.name)
        : here
          ? join(location.path, chosen.name)
          : through(`/${present.path}`);
  const replaced = target.existing !== null && isWithin(location.top, `/${target.existing.path}`);
  if (here && !own && replaced)
    throw new UsageError(
      `${location.id} is inside of ${o.target.id}, which would be moved away with the backups`,
    );
  const chains = new Map(own ? location.record.chains : []);
  if (own)
    chains.set(location.prefix, { ...location.chain, destinations: knownDestinations(location) });
  const pins = new Set(
    [...chains.values()].flatMap(({ destinations = [] }) =>
      destinations.map(({ pin }) => pin?.uuid),
    ),
  );
  const every = location.standing.filter(
    ({ name, readonly }) => readonly && prefixOf(name) !== null && !name.includes("\n"),
  );
  const moved =
    !own || outside === location
      ? []
      : replaced
        ? every
        : every.filter(({ uuid }) => pins.has(uuid) || (pins.size > 0 && uuid === chosen.uuid));
  const how =
    named || moved.some(({ uuid }) => uuid === chosen.uuid) ? "none" : here ? "plain" : "keep";
  const from = replaced
    ? join(target.full, location.top.slice(`/${target.existing?.path}`.length))
    : through(location.top);
  const movable =
    replaced ||
    (isWithin(location.top, mount.root) && placeOn(target.mounts, from).top === location.top);
  if (
    moved.length > 0 &&
    (!movable || (outside !== null && placeOn(target.mounts, outside.path).mount !== mount))
  )
    throw new Failure(
      `the snapshots of ${location.id} can only move to ${o.target.id} below one mount point: mount the top level (subvolid=5), and restore there`,
    );
  if (replaced && target.existing?.readonly && moved.length > 0)
    throw new Failure(
      `${o.target.id} is read-only, so its snapshots cannot move: btrfs property set -ts ${quote(target.full)} ro false`,
    );
  const cleared = [...leftoversOf(target.name, target).keys()].map(
    (leftover) => `${join(target.top, leftover)}/`,
  );
  const twins =
    how === "keep"
      ? target.subvolumes.filter(
          ({ path, readonly, receivedUuid }) =>
            readonly &&
            receivedUuid === dataOf(chosen) &&
            !cleared.some((leftover) => `/${path}`.startsWith(leftover)),
        )
      : [];
  const now = stamp(new Date());
  const [work, before] = [
    `${target.name}.restoring-${now}`,
    target.existing === null ? "" : `${target.name}.before-${now}`,
  ];
  // A source's own snapshots, and backups on this filesystem, are no destination to be remembered.
  const came = here || isSnapshotFolder(location) ? null : location;
  return {
    present,
    parent,
    why,
    pieces,
    origin,
    how,
    moved,
    from,
    to: outside?.path ?? join(target.full, target.inside ?? ""),
    chains,
    came,
    away: own && !replaced,
    left: replaced ? join(target.path, before) : location.path,
    twins,
    work,
    before,
  };
}

/** Makes TARGET a writable subvolume with a backup's contents, and lets its next runs go on from there. */
export async function restore(o: RestoreOptions, report: Report): Promise<void> {
  for (;;)
    try {
      return await restoreOnce(o, report);
    } catch (error) {
      if (!(error instanceof SameSecond)) throw error;
      await nextSecond();
    }
}

async function restoreOnce(o: RestoreOptions, report: Report): Promise<void> {
  const display = displayOf(o);
  if (!o.dryRun) await finishRestores(o.target, o.target.path, o.hosts);
  const location = await openLocation(o.location, { ...o, wait: o.dryRun ? "look" : o.wait });
  const opened = [location];
  try {
    const chosen = choose(location, o);
    const target = await openTarget(o, location.prefix);
    const outside = target.inside === null ? await openOutside(target, location, o) : null;
    if (outside !== null && outside !== location) opened.push(outside);
    const asked =
      o.parentFrom === null
        ? null
        : await openFolder(
            { ...o.target, id: o.parentFrom },
            o.target.host === null ? resolve(o.parentFrom) : o.parentFrom,
            { prefix: location.prefix, wait: "look", hosts: o.hosts },
          );
    if (asked !== null && asked.place.filesystem !== target.place.filesystem)
      throw new UsageError(
        `--parent-from ${o.parentFrom} is not on the filesystem of ${o.target.id}`,
      );

    if (location.store === null) compressionBetween(location, target, o.sending.level);
    const ground = await groundOf(location, target, outside, asked, o);
    const inquiry = inquiryInto(location);
    const fitness =
      location.store !== null
        ? ANY
        : judge(inquiry, { cleared: {}, refused: new Map() }, () => true);
    const decide = () => decideRestore(location, chosen, target, outside, ground, fitness, o);
    let decided = decide();
    for (
      ;
      decided.parent !== null && fitness.unfit(decided.parent, chosen) === undefined;
      decided = decide()
    )
      await learn(
        inquiry,
        changedSince(decided.parent, inquiry, {}) === undefined ? [decided.parent] : [],
        [{ parent: decided.parent, snapshot: chosen }],
      );
    const {
      present,
      parent,
      why,
      pieces,
      origin,
      how,
      moved,
      from,
      to,
      chains,
      came,
      away,
      left,
      twins,
      work,
      before,
    } = decided;
    if (twins.length > 0)
      report.warning(
        `${o.target.id}: ${chosen.name} stands twice on its filesystem then, which can confuse "btrfs receive"; keep one of it and ${twins.map(({ path }) => path).join(", ")}`,
      );
    if (asked !== null && present === null && parent === null)
      report.warning(`--parent-from ${o.parentFrom}: nothing there is shared with ${location.id}`);
    for (const prefix of o.dryRun ? [] : prefixesIn(moved))
      if (prefix !== location.prefix)
        opened.push(
          await openFolder(o.location, location.path, { prefix, wait: o.wait, hosts: o.hosts }),
        );
    const sums =
      location.store === null
        ? new Map<string, string>()
        : await readyPieces(location, location.store, pieces, target, o);
    await clearLeftovers(target, null, o);
    const sent =
      pieces.length > 0
        ? `${count(pieces.length, "stream")}, ${inBytes(pieces.reduce((sum, { bytes }) => sum + bytes, 0))}`
        : `${parent !== null ? `difference to ${parent.name}` : "in full"}${why === undefined ? "" : `: ${why}`}`;
    log.info(
      `${o.dryRun ? "Would restore" : "Restoring"} ${chosen.name} from ${location.id} to ${o.target.id} (${present !== null ? "reflinked, nothing is sent" : sent})`,
    );
    if (moved.length > 0)
      log.info(
        `${o.dryRun ? "Would move" : "Moving"} ${count(moved.length, "snapshot")} from ${location.path}, so that every destination goes on from ${o.target.id}`,
      );
    if (!o.dryRun) {
      needOurs(target, o.target.id);
      const begun = hold(
        target.host,
        RESTORING,
        { ...at(target), work, end: `${work} end`, silence: silence(target.host) },
        `${work} end`,
        o.target.id,
      );
      const { output, release } = await begun.catch((error: Error) => {
        throw error instanceof Taken ? new SameSecond(error.message) : error;
      });
      try {
        const holder = output.split("\n")[0] as string;
        const folder = {
          ...target,
          path: join(target.path, work),
          holder,
          host: behindFence(plainHost(target.host), { ...target, holder }),
        };
        const discard = async (name: string) =>
          void (await ask(
            target.host,
            DISCARD,
            { ...at(folder), prefix: folder.prefix, name, ...NO_RECORD },
            `cannot remove what was received of ${name}`,
          ));
        // What is built on can be damaged; then nothing is.
        const without = (error: unknown) => {
          if (!(error instanceof BadParent)) throw error;
          report.warning(
            `${o.target.id}: ${error.message}; what it was to build on there ${DAMAGED} (see "btrfs-backup verify"): ${chosen.name} is received in full`,
          );
        };
        if (location.store !== null) {
          const { store } = location;
          await receivePieces(location, store, pieces, sums, folder, display, o, report).catch(
            async (error) => {
              without(error);
              await discard(pieces[0]?.name as string);
              const all = chainOf(chosen as Entry as Stream, byUuid(store.streams));
              await receivePieces(
                location,
                store,
                all,
                await readyPieces(location, store, all, target, o),
                folder,
                display,
                o,
                report,
              );
            },
          );
        } else if (present === null) {
          const form = formBetween(location, target, o.sending);
          const end = (level: string) => receiving(folder, chosen.name, level, null, o.btrfsDebug);
          const receive = async (source: Folder, transfer: Transfer) => ({
            stages: mustBeChecked(source, folder, o.sending)
              ? checked(folder, form.level, expected(source, transfer), end)
              : [end(form.level)],
          });
          const receiver = {
            id: o.target.id,
            form: () => form,
            receive,
            discard,
            tidy: async () => {},
          };
          const receiveAs = async (parent: Snapshot | null) => {
            const sent = await transferTo(
              receiver,
              location,
              { snapshot: chosen, parent },
              display,
            );
            report.event("transfer", {
              destination: o.target.id,
              name: chosen.name,
              parent: parent?.name ?? null,
              ...sent,
            });
          };
          await receiveAs(parent).catch(async (error) => {
            if (parent === null) throw error;
            without(error);
            await receiveAs(null);
          });
        }
        await ask(
          target.host,
          BUILD,
          {
            ...at(target),
            work,
            origin,
            target: outside?.path ?? target.inside ?? "",
            name: chosen.name,
            how,
          },
          `cannot build ${o.target.id}`,
        );
        await settle(target, join(target.path, work, "tree"), outside, chains, chosen, came, o);
        // From here on there is no way back, only one forward.
        checkInterruption();
        const names = moved.flatMap(({ name, receivedUuid }) => [
          receivedUuid === null ? "move" : "copy",
          name,
        ]);
        const told = [from, to, before === "" ? "new" : "old", ...names, "end", ""].join("\n");
        const finished = await whileCleaning(() =>
          ask(
            target.host,
            FINISH,
            { ...at(target), work, how: "begin" },
            `cannot finish ${o.target.id}`,
            told,
          ),
        ).catch(async (error) => {
          throw new Failure(await howFar(target, work, before, left, (error as Error).message, o));
        });
        await release();
        const { stuck } = parseFinished(finished);
        if (stuck.length > 0)
          report.error(
            o.target.id,
            new Failure(
              `it is restored, but these snapshots could not move from ${left}: ${stuck.join(" ")}`,
            ),
          );
        if (moved.some(({ receivedUuid }) => receivedUuid !== null))
          await settle(target, target.full, outside, chains, chosen, null, o);
      } catch (error) {
        await release();
        await whileCleaning(() => clearLeftovers(target, work, o)).catch((problem: Error) =>
          log.warn(`${problem.message} (the next restore to ${o.target.id} will)`),
        );
        throw error;
      }
    }
    report.event("restore", {
      location: location.id,
      name: chosen.name,
      target: o.target.id,
      before: before === "" ? null : join(target.path, before),
    });
    tellWhatIsNext(target, location, chosen, before, moved, away, o, report);
  } finally {
    await whileCleaning(async () => {
      for (const folder of opened) await folder.close();
    });
  }
  report.event("summary", { ok: !report.failed });
}

/** Makes sure that every piece can be read before the first byte moves, and returns their checksums. Errors: Failure naming what is missing. */
async function readyPieces(
  location: Folder,
  { verbs }: Store,
  pieces: readonly Stream[],
  target: Target,
  o: RestoreOptions,
): Promise<Map<string, string>> {
  if (o.sending.level !== "")
    throw new UsageError("--compress: a stored stream travels as it was stored");
  if (pieces.some(({ encrypted }) => encrypted) && which.sync("gpg", { nothrow: true }) === null)
    throw new Failure("gpg not found: install gnupg");
  if (pieces.some(({ compressed }) => compressed) && !target.zstd)
    throw new Failure(`${target.host.label || target.hostName}: zstd not found: install zstd`);
  if (o.unverified) return new Map();
  const unsummed = pieces.find(({ summed }) => !summed);
  if (unsummed !== undefined)
    throw new Failure(
      `${location.id}: ${unsummed.uuid} has no checksum object; --unverified restores without`,
    );
  return readSums(location, verbs, pieces);
}

/** The checksum objects of streams. */
async function readSums(
  location: Folder,
  verbs: StoreVerbs,
  streams: readonly Stream[],
): Promise<Map<string, string>> {
  const texts: string[] = [];
  for (const some of chunks(streams.map(({ uuid }) => uuid + SUM)))
    texts.push(
      await ask(
        location.host,
        verbs.get,
        { ...at(location), how: "", holder: "", objects: some },
        `${location.id}: cannot read checksum objects`,
      ),
    );
  return parseSums(texts.join(""));
}

/** How many subvolumes that others were received on top of stand in the way at most. */
const BELOW = 16;

/** Receives stored streams, one on top of the other, and removes each when the next stands on it. Errors: Failure naming a piece that is damaged, and what can be restored without it. */
async function receivePieces(
  location: Folder,
  { verbs, streams }: Store,
  pieces: readonly Stream[],
  sums: ReadonlyMap<string, string>,
  work: Folder,
  display: Display,
  o: RestoreOptions,
  report: Report,
): Promise<void> {
  const all = byUuid(streams);
  const without = ({ uuid }: Stream) =>
    instead(
      location,
      wholeIn(location).filter(
        (one) => !chainOf(one as Entry as Stream, all).some((piece) => piece.uuid === uuid),
      ),
    );
  const below: Stream[] = [];
  for (const [i, piece] of pieces.entries()) {
    const { uuid: object, name, bytes: size, compressed, encrypted } = piece;
    const fetch = staged(
      "reading",
      location.host,
      verbs.get,
      { ...at(location), how: "", holder: holderOf(location), objects: [object] },
      { sends: true },
    );
    const decrypt = encrypted ? [{ label: "gpg", command: `${GPG} --decrypt` }] : [];
    const end = (level: string) => receiving(work, name, level, null, o.btrfsDebug);
    const level = compressed ? "1" : "";
    const received = o.sending.trust
      ? [end(level)]
      : checked(work, level, { name, uuid: piece.receivedUuid as string, parent: piece.from }, end);
    if (o.sending.trust) log.info(`${object} is received as it is, by --trust-stream`);
    const began = Date.now();
    log.debug(`Receiving ${object}`);
    const { summed } = await pipeline([
      fetch,
      ...meter(`${i + 1}/${pieces.length} ${name}`, display, o.sending.rate, size),
      relaying({ sum: true }),
      ...decrypt,
      ...received,
    ]).catch((error: Error) => {
      if (error instanceof BadParent && i === 0 && piece.parentUuid !== null) throw error;
      if (error instanceof Failure && !(error instanceof NoSpace))
        throw new Failure(
          `${location.id}: ${object}: ${error.message}. If it is damaged: ${without(piece)}`,
        );
      throw error;
    });
    const { sum, bytes } = summed as Summed;
    const right = sums.get(object);
    if (!o.unverified && sum !== right)
      throw new Failure(
        `${location.id}: ${object} is damaged: it has the SHA-256 ${sum}, and should have ${right ?? "one"}; ${without(piece)}`,
      );
    report.event("transfer", {
      destination: o.target.id,
      name,
      parent: all.get(piece.parentUuid ?? "")?.name ?? null,
      bytes,
      seconds: (Date.now() - began) / 1000,
    });
    // What the next one stands on goes, a few at a time, unless that is much.
    if (i > 0) below.push(pieces[i - 1] as Stream);
    if (
      piece !== pieces.at(-1) &&
      below.length < BELOW &&
      below.reduce((sum, { bytes }) => sum + bytes, 0) < SMALL.all
    )
      continue;
    await deleteFrom(
      work,
      below.splice(0).map(({ name }) => ({ name, id: null })),
      { convertRw: false, sync: false },
    );
  }
}

/**
 * Writes what the record of a restored subvolume's snapshot folder must say: what it said when the snapshot was
 * taken is outdated. `live`: what is said of the source's own snapshots that move; `backups`: where it came from.
 */
async function settle(
  target: Target,
  tree: string,
  outside: Folder | null,
  live: ReadonlyMap<string, ChainRecord>,
  chosen: Snapshot,
  backups: Folder | null,
  o: RestoreOptions,
): Promise<void> {
  const own = live.size > 0;
  const folder = await openFolder(o.target, outside?.path ?? join(tree, target.inside ?? ""), {
    prefix: target.prefix,
    wait: "look",
    hosts: o.hosts,
    source: tree,
  });
  const snapshot = folder.standing.find(({ name }) => name === chosen.name);
  const uuids = new Map(folder.standing.map(({ name, uuid }) => [name, uuid]));
  for (const prefix of new Set([...(own ? live : folder.record.chains).keys(), folder.prefix])) {
    const { owner: _, ...chain } = { ...folder.record.chains.get(prefix), ...live.get(prefix) };
    const previous = outside?.record.chains.get(prefix)?.owner;
    const elsewhere =
      previous !== undefined &&
      previous.path !== target.full &&
      target.subvolumes.some(({ uuid }) => uuid === previous.uuid);
    const came =
      backups !== null && snapshot && prefix === folder.prefix
        ? {
            id: backups.id,
            filesystem: backups.place.filesystem,
            pin: { name: snapshot.name, uuid: snapshot.uuid },
          }
        : null;
    // A snapshot that was replaced by its copy on the way has another UUID.
    const recorded = (chain.destinations ?? []).map((known) => ({
      ...known,
      pin:
        known.pin && own
          ? { ...known.pin, uuid: uuids.get(known.pin.name as EntryName) ?? known.pin.uuid }
          : known.pin,
    }));
    const destinations = restoredDestinations(
      recorded,
      (uuid) => own || [...uuids.values()].includes(uuid),
      came,
    );
    const owner =
      outside === null
        ? {}
        : elsewhere
          ? { owner: previous }
          : {
              owner: { uuid: folder.source?.uuid ?? "", host: target.hostName, path: target.full },
            };
    // What a backup brings along says where it was kept: on another host, or in a store, others can have written it.
    const doubted =
      !own &&
      (backups === null || backups.host.ssh !== null || backups.store !== null || !backups.trusted);
    await writeRecord(
      { ...folder, prefix },
      {
        ...chain,
        ...owner,
        destinations,
        ...(doubted && recorded.length > 0 ? { guarded: true as const } : {}),
      },
    );
  }
}

/** Says what a restore leaves to its user. */
function tellWhatIsNext(
  target: Target,
  location: Folder,
  chosen: Snapshot,
  before: string,
  moved: readonly Entry[],
  away: boolean,
  o: RestoreOptions,
  report: Report,
): void {
  if (o.dryRun) return log.info("Nothing was changed");
  log.info(`Done: ${o.target.id} is as it was in ${chosen.name}`);
  const p = o.snapshotFolder === "snapshot" ? [] : ["-f", o.snapshotFolder];
  const again = [
    "btrfs-backup",
    "--adopt",
    ...(location.prefix === "" ? [] : ["-p", location.prefix]),
    ...p,
    o.target.id,
  ]
    .map(shellWord)
    .join(" ");
  const { owner } = location.chain;
  const stored = location.store?.streams.find(({ uuid }) => uuid === chosen.uuid)?.owner.place;
  if (
    stored !== undefined &&
    stored !== ownerOf({ uuid: "", host: target.hostName, path: target.full }).place
  )
    log.info(
      `The streams in ${location.id} were stored from another host or path: a run from ${target.hostName}:${target.full} is refused. If that shall be their source from now on: ${again} ${shellWord(location.id)}`,
    );
  if (away && moved.length > 0)
    report.warning(
      `${location.path} has no longer what its destinations share with it: they go on from ${o.target.id}, once it has the path of their source or by "${again} DEST…"`,
    );
  else if (
    !away &&
    !isSnapshotFolder(location) &&
    location.place.filesystem !== target.place.filesystem &&
    owner !== undefined &&
    (owner.host !== target.hostName || owner.path !== target.full)
  )
    log.info(
      `The backups in ${location.id} belong to ${owner.host}:${owner.path}: a run goes on from there, but is refused from ${target.hostName}:${target.full}. If that shall be their source from now on: ${again} ${shellWord(location.id)}`,
    );
  if (before === "" || target.existing === null) return;
  const gone = new Set(moved.map(({ path }) => path));
  const old = target.existing.path;
  const nested = target.subvolumes
    .filter(({ path }) => path.startsWith(`${old}/`) && !gone.has(path))
    .map(({ path }) => path.slice(old.length));
  const kept = join(target.path, before);
  const words =
    nested.length <= 3
      ? nested.map((path) => quote(kept + path))
      : [...new Set(nested.map((path) => `${quote(kept + dirname(path))}/*`))];
  if (nested.length > 0)
    report.warning(
      `${count(nested.length, "subvolume")} below the old ${o.target.id} ${nested.length === 1 ? "is" : "are"} now below ${kept}`,
    );
  log.info(
    `The old one is ${kept}. When you do not need it any more: btrfs subvolume delete ${[...words.reverse(), quote(kept)].join(" ")}`,
  );
}

/** A column of a table: a location that could be opened, or why not. */
type Column = {
  readonly id: string;
  readonly folder: Folder | null;
  readonly problem: string | null;
  /** It was not opened. */ readonly left?: true;
};

/** What stands behind a column's name. */
const whyEmpty = ({ problem, left }: Pick<Column, "problem" | "left">) =>
  problem === null ? "" : left ? `, not looked at: ${problem}` : ", cannot be read";

/** Opens a location only to look; `known`: what SOURCE's record says of it. One that cannot be opened is a failure of the command, but not its end. */
async function openColumn(location: Location, o: ColumnOptions): Promise<OpenedColumn> {
  const { id } = location;
  try {
    if (location.kind === "shell") return { id, folder: null, problem: null };
    const folder = await openLocation(location, { ...o, wait: "look" });
    if (folder.place.filesystem === null && folder.store === null)
      throw new Absent("not on btrfs (is the disk mounted?)");
    return { id, folder, problem: null };
  } catch (error) {
    return { id, folder: null, problem: (error as Error).message, error: error as Error };
  }
}
type ColumnOptions = Pick<RunOptions, "hosts" | "snapshotFolder"> & {
  readonly prefix: string | null;
};
type OpenedColumn = Column & { readonly error?: Error };

/** Tells what is wrong with a place, and goes on without it. Errors: UsageError, Interrupted. */
function toldOf({ error, ...column }: OpenedColumn, report: Report): Column {
  if (error instanceof UsageError || error instanceof Interrupted) throw error;
  if (error !== undefined) report.error(column.id, error);
  return column;
}

/** A place that was opened while nobody knew yet which prefix it is about, nor which filesystem was there before. */
async function withKnown(
  location: Location,
  early: OpenedColumn,
  known: KnownDestination | undefined,
  o: ColumnOptions,
): Promise<OpenedColumn> {
  const { id, folder } = early;
  if (folder === null) return early;
  if (known?.filesystem && known.filesystem !== folder.place.filesystem) {
    const error = new Absent("another filesystem than before is there (is the disk mounted?)");
    return { id, folder: null, problem: error.message, error };
  }
  if (o.prefix === null) return openColumn(location, o);
  return folder.prefix === o.prefix ? early : { ...early, folder: withPrefix(folder, o.prefix) };
}

/** The first location, and the others: given, or known to the first if that is a SOURCE. They are opened side by side, and told of in order. */
async function openColumns(
  first: Location,
  others: readonly Location[],
  addKnown: boolean,
  o: ColumnOptions,
  report: Report,
): Promise<Column[]> {
  const early = { ...o, prefix: o.prefix ?? "" };
  const open = (location: Location) => ({ location, opening: openColumn(location, early) });
  const asked = new Map(others.map((location) => [location.id, open(location)]));
  const source = toldOf(await openColumn(first, o), report);
  const known =
    source.folder !== null && isSnapshotFolder(source.folder)
      ? [
          ...new Set([
            ...prefixesIn(source.folder.standing),
            ...source.folder.record.chains.keys(),
          ]),
        ].flatMap((prefix) => knownDestinations(withPrefix(source.folder as Folder, prefix)))
      : [];
  const remembered = new Map(known.map((one) => [one.location, one]));
  const doubts =
    source.folder === null
      ? []
      : [...source.folder.record.chains.values(), source.folder.chain].map((chain) =>
          disbelief({ ...(source.folder as Folder), chain }),
        );
  const doubt = doubts.find((one) => one !== null) ?? null;
  const added = addKnown ? [...remembered.keys()].filter((id) => !asked.has(id)) : [];
  for (const id of doubt === null ? added : []) asked.set(id, open(recordedLocation(id)));
  const left =
    doubt === null
      ? []
      : added.map((id): Column => ({ id, folder: null, problem: doubt, left: true }));
  const prefix = o.prefix ?? (source.folder?.snapshots.length ? source.folder.prefix : null);
  const opened = await Promise.all(
    [...asked].map(async ([id, { location, opening }]) =>
      withKnown(location, await opening, remembered.get(id), { ...o, prefix }),
    ),
  );
  return [source, ...opened.map((column) => toldOf(column, report)), ...left];
}

export type ListOptions = ReturnType<typeof listOptions>;

/** Shows what each location has of each snapshot. */
export async function list(o: ListOptions, report: Report): Promise<void> {
  const now = wallClock(new Date());
  const [first, ...others] = o.locations as [Location, ...Location[]];
  const { maxAge } = o;
  // What cannot be read is told in the one line of its own.
  const columns = await openColumns(
    first,
    others,
    others.length === 0 && maxAge === null,
    { ...o, prefix: o.prefix ?? "" },
    maxAge === null ? report : { ...report, error: () => {} },
  );
  if (maxAge !== null) return checkAge(columns, { ...o, maxAge }, Date.now(), report);
  const prefixes = new Set(
    o.prefix !== null
      ? [o.prefix]
      : columns.flatMap(({ folder }) => prefixesIn(folder?.standing ?? [])),
  );
  for (const prefix of prefixes.size === 0 ? [""] : prefixes) {
    const shown = columns.map((column) => ({
      ...column,
      folder:
        column.folder &&
        (column.folder.prefix === prefix ? column.folder : withPrefix(column.folder, prefix)),
    }));
    const sizes = new Map(
      (
        await Promise.all(
          shown.map(({ id, folder }) =>
            o.size && folder ? sizesIn(folder).catch((error) => (report.error(id, error), [])) : [],
          ),
        )
      ).flat(),
    );
    const { locations, snapshots } = inventory(shown, o, now, sizes);
    report.event("list", { prefix, locations, snapshots });
    if (o.json) continue;
    const legend = locations.map(({ id, last, source }, i) => {
      const reached =
        source || last === undefined
          ? ""
          : `, last served ${last === null ? "never" : `${inWords(Date.now() - Date.parse(last))} ago`}`;
      return `${letter(i)}  ${id}${source ? " (source)" : ""}${reached}${whyEmpty(columns[i] as Column)}`;
    });
    const cells = snapshots.map(({ name, time, at: marks }) => [
      name,
      inWords(now - Date.parse(`${time}Z`)),
      ...marks.map((mark) =>
        mark === null
          ? "-"
          : [
              mark.state + (mark.pin ? ", pin" : "") + (mark.goes ? ", goes" : ""),
              ...(mark.bytes === null ? [] : [inBytes(mark.bytes)]),
            ].join(" "),
      ),
    ]);
    print(
      `${legend.join("\n")}\n\n${cells.length === 0 ? "no snapshots\n" : table([["NAME", "AGE", ...locations.map((_, i) => letter(i))], ...cells])}\n`,
    );
  }
  report.event("summary", { ok: !report.failed });
}

/** Bytes referenced by each whole snapshot of a folder, by UUID. */
async function sizesIn(folder: Folder): Promise<[string, number][]> {
  const whole = wholeIn(folder);
  if (folder.store !== null) return folder.store.streams.map(({ uuid, bytes }) => [uuid, bytes]);
  const printed: string[] = [];
  for (const names of chunks(whole.map(({ name }) => `./${name}`)))
    printed.push(
      await ask(folder.host, SIZES, { ...at(folder), names }, `${folder.id}: cannot tell sizes`),
    );
  const lines = printed
    .join("\n")
    .split("\n")
    .map((line) => /^\s*(\d+)\s.*?\s\.\/(.*)$/.exec(line));
  const bytes = new Map(
    lines.filter((match) => match !== null).map(([, size, name]) => [name, Number(size)]),
  );
  const unknown = whole.find(({ name }) => !bytes.has(name));
  if (unknown !== undefined)
    throw new Failure(
      `"btrfs filesystem du" did not tell the size of ${unknown.name}: ${printed.join("\n").slice(0, 200)}`,
    );
  return whole.map(({ uuid, name }) => [uuid, bytes.get(name) as number]);
}

/** What `list` shows: for each snapshot, newest first, a mark for each location; null where that has nothing. */
export function inventory(
  columns: readonly Column[],
  policies: Pick<ListOptions, "sourcePolicy" | "backupPolicy">,
  now: number,
  sizes: ReadonlyMap<string, number>,
) {
  const source =
    columns[0]?.folder && isSnapshotFolder(columns[0].folder) ? columns[0].folder : null;
  const taken = source === null ? [] : wholeIn(source);
  const known = source === null ? [] : knownDestinations(source);
  const sides = columns.map(({ folder, id }) => {
    const own = folder !== null && folder === source;
    const ownIn = ({ streams }: Store) =>
      source === null
        ? new Set(streams.map(({ owner }) => owner.lineage))
        : lineagesOf(
            streams,
            ownerOf({ uuid: source.source?.uuid ?? "", host: "", path: "" }),
            taken,
          );
    const standing =
      folder &&
      (folder.store !== null
        ? standingInStore(folder.store, folder.prefix, ownIn(folder.store))
        : standingIn(folder, folder.chain, []));
    const pinned = standing && !own ? newestShared(taken, standing.held) : null;
    const claimants = known.map((destination) => ({
      id: destination.location,
      pin: destination.pin,
      unread: false,
      unsentPolicy: null,
    }));
    const decisions = own
      ? planSource(taken, policies.sourcePolicy, claimants, now, {
          adopted: folder.chain.leaps ?? [],
        })
      : standing && isSnapshotFolder(folder)
        ? []
        : standing
          ? planDestination(
              taken,
              standing,
              policies.backupPolicy,
              now,
              source?.chain.leaps ?? folder.chain.leaps,
            )
          : [];
    const goes = new Set(
      decisions.filter(({ reasons }) => reasons.length === 0).map(({ entry }) => entry.uuid),
    );
    // What cannot be asked: what the source remembers.
    const pin = own
      ? null
      : standing
        ? pinned && (dataFinder(standing.held)(pinned)?.uuid ?? null)
        : (known.find(({ location }) => location === id)?.pin?.uuid ?? null);
    return { own, folder, goes, pin };
  });
  const snapshots = align(columns.map(({ folder }) => folder))
    .reverse()
    .map(({ name, time, cells }) => ({
      name,
      time: new Date(time).toISOString().slice(0, 19),
      at: sides.map(({ folder, goes, pin }, i) => {
        const { state, entry } = cells[i] ?? {};
        const isPin =
          pin !== null && (folder === null ? cells[0]?.entry.uuid : entry?.uuid) === pin;
        if (entry === undefined)
          return folder === null
            ? { state: "?", pin: isPin, goes: false, uuid: null, bytes: null }
            : null;
        return {
          state,
          pin: isPin,
          goes: goes.has(entry.uuid),
          uuid: entry.uuid,
          bytes: sizes.get(entry.uuid) ?? null,
        };
      }),
    }));
  const locations = columns.map(({ id, problem }, i) => ({
    id,
    source: sides[i]?.own ?? false,
    error: problem,
    last: known.find(({ location }) => location === id)?.last,
  }));
  return { locations, snapshots };
}

/** One line a location for a monitoring system: whether its newest complete backup is young enough. */
function checkAge(
  columns: readonly Column[],
  {
    maxAge,
    json,
    prefix,
  }: { maxAge: { count: number; unit: Unit; text: string }; json: boolean; prefix: string | null },
  now: number,
  report: Report,
): void {
  for (const { id, folder, problem } of columns) {
    const prefixes =
      prefix !== null || folder === null ? [prefix ?? ""] : prefixesIn(folder.standing);
    // What is dated in the future (more than time zones differ) would be young for ever.
    const newestOf = (one: string) =>
      folder &&
      (wholeIn(withPrefix(folder, one))
        .filter(({ moment }) => moment < now + DURATION.d)
        .sort((a, b) => b.moment - a.moment)[0] ??
        null);
    const newests = prefixes.map(newestOf);
    const newest = newests.includes(null)
      ? null
      : (newests.toSorted((a, b) => (a?.moment ?? 0) - (b?.moment ?? 0))[0] ?? null);
    const ok = newest !== null && newest.moment >= before(now, maxAge.count, maxAge.unit);
    if (!ok) report.failed = true;
    report.event("age", { location: id, ok, newest: newest?.name ?? null, error: problem });
    if (!json)
      print(
        `${ok ? "OK" : problem === null ? "TOO OLD" : "UNKNOWN"}: ${id}: ${newest === null ? (problem ?? "no complete backup") : `the newest backup is ${newest.name}, ${inWords(now - newest.moment)} old`} (at most ${maxAge.text})\n`,
      );
  }
}

/** What a column is called below its legend. */
const letter = (i: number) => (i < 26 ? String.fromCharCode(65 + i) : String(i));

export type VerifyOptions = ReturnType<typeof verifyOptions>;

/** Reads every byte of what two locations share, on their hosts, and compares. */
export async function verify(o: VerifyOptions, report: Report): Promise<void> {
  const columns = await openColumns(
    o.locations[0] as Location,
    o.locations.slice(1),
    false,
    o,
    report,
  );
  let compared = 0;
  for (const { folder } of columns)
    if (folder?.store) compared += await verifyStreams(folder, folder.store, o, report);
  const [first, ...others] = columns.filter(({ folder }) => !folder?.store);
  const left = first?.folder ?? null;
  const digests = new Map<string, Promise<string>>();
  const equal = new Map<string, Snapshot[]>();
  for (const { folder: right, id } of left === null ? [] : others) {
    if (left === null || right === null) continue;
    if (samePlace(left, right)) {
      report.error(id, new Failure(`it is the same folder as ${left.id}`));
      continue;
    }
    const rows = align([left, right]);
    const shared = rows.filter(({ cells }) => cells.every((cell) => cell?.state === "whole"));
    const wanted =
      o.snapshot !== null
        ? shared.filter(({ name }) => name === o.snapshot)
        : o.all
          ? shared
          : shared.slice(-1);
    for (const { name, cells } of o.all ? rows : [])
      if (
        cells.every((cell) => cell !== undefined) &&
        cells.some((cell) => cell?.state !== "whole")
      )
        report.warning(
          `${name} in ${id} is not compared: it is incomplete there, or has other data`,
        );
    if (wanted.length === 0)
      report.error(
        id,
        new Failure(
          o.snapshot === null
            ? `nothing complete is shared with ${left.id}`
            : `${o.snapshot} is not complete on both sides, or not the same snapshot`,
        ),
      );
    for (const { name, cells } of wanted) {
      const [ours, theirs] = cells.map((cell) => cell?.entry) as [Snapshot, Snapshot];
      try {
        log.info(`Reading ${name} in ${left.id} and ${id}`);
        if (!digests.has(ours.uuid)) digests.set(ours.uuid, digestIn(left, ours));
        const [a, b] = await allOf([
          digests.get(ours.uuid) as Promise<string>,
          digestIn(right, theirs),
        ]);
        const differences = a === b ? [] : await compare([left, ours], [right, theirs]);
        compared++;
        report.event("verify", { location: id, name, equal: a === b, sha256: b, differences });
        if (a === b) equal.set(id, [...(equal.get(id) ?? []), ours]);
        if (a === b) log.info(`${name} in ${id} is equal (SHA-256 ${b})`);
        else
          report.error(
            id,
            new Failure(
              `${name} differs from ${left.id}: ${differences.slice(0, 10).join("; ")}${differences.length > 10 ? `; and ${differences.length - 10} more` : ""}`,
            ),
          );
      } catch (error) {
        report.error(id, error);
      }
    }
  }
  if (compared === 0) report.error(null, new Failure("nothing was compared"));
  if (left !== null && equal.size > 0)
    await rememberEqual(left, equal, o).catch((problem: Error) =>
      log.warn(`the next run may compare once more: ${problem.message}`),
    );
  report.event("summary", { ok: !report.failed, compared });
}

/** Writes into a source's record which of its snapshots were changed since they were taken, and are what their backups are all the same. Errors: Failure, Busy. */
async function rememberEqual(
  source: Folder,
  equal: ReadonlyMap<string, readonly Snapshot[]>,
  o: VerifyOptions,
): Promise<void> {
  const isKnown = ({ chain }: Folder) =>
    (chain.destinations ?? []).some(({ location }) => equal.has(location));
  const inquiry = inquiryInto(source);
  const asked = [...equal.values()]
    .flat()
    .filter((one) => changedSince(one, inquiry, {}) === undefined);
  if (!isKnown(source) || asked.length === 0 || source.record.unreadable !== null) return;
  await learn(inquiry, asked, []);
  if (!asked.some((one) => changedSince(one, inquiry, {}))) return;
  const folder = await openFolder(o.locations[0] as Readable, source.path, {
    prefix: source.prefix,
    wait: 0,
    hosts: o.hosts,
  });
  try {
    const destinations = (folder.chain.destinations ?? []).map((known) => {
      const changed = (equal.get(known.location) ?? []).filter((one) =>
        changedSince(one, inquiry, {}),
      );
      return {
        ...known,
        ...clearedOf(folder.standing, {
          ...known.cleared,
          ...Object.fromEntries(
            changed.map(({ uuid }) => [uuid, inquiry.ctransids.get(uuid) ?? 0]),
          ),
        }),
      };
    });
    if (isKnown(folder) && !sameRecord(folder.chain, { ...folder.chain, destinations }))
      await writeRecord(folder, { ...folder.chain, destinations });
  } finally {
    await whileCleaning(folder.close);
  }
}

/** The SHA-256 of a stored stream, or why it cannot be told. `refused`: it would be, where it is restored, as far as that can be told here. */
type Read =
  { readonly sha256: string; readonly refused: string | null } | { readonly problem: string };
async function readStream(
  folder: Folder,
  verbs: StoreVerbs,
  { uuid: object, name, receivedUuid, from, compressed, encrypted }: Stream,
): Promise<Read> {
  const place = { ...at(folder), objects: [object] };
  let refused: string | null = null;
  if (
    !encrypted &&
    folder.host.ssh === null &&
    !(compressed && which.sync("zstd", { nothrow: true }) === null)
  ) {
    const fetch = staged(
      "reading",
      folder.host,
      verbs.get,
      { ...place, how: "", holder: holderOf(folder) },
      { sends: true },
    );
    const unpack: Stage[] = compressed ? [{ label: "zstd", command: "zstd -q -d -c" }] : [];
    const check = { name, uuid: receivedUuid as string, parent: from, alone: false };
    const read = await pipeline([
      fetch,
      relaying({ sum: true }),
      ...unpack,
      relaying({ check, drop: true }),
    ]).catch((error: Error) => error.message);
    checkInterruption();
    if (typeof read !== "string") return { sha256: read.summed?.sum ?? "", refused };
    refused = read; // or it is damaged, which its sum tells
  }
  try {
    const told = await ask(
      folder.host,
      verbs.get,
      { ...place, how: "sum", holder: "" },
      `${folder.id}: cannot read ${object}`,
    );
    return { sha256: told.slice(0, 64), refused };
  } catch (error) {
    checkInterruption();
    return { problem: (error as Error).message };
  }
}

/** Small streams, in bytes: how large one is at most, and all that are read at a time. */
const SMALL = { one: 1 << 20, all: 32 << 20 };

/** Small streams of a folder, as many at a time as are read at once. */
function smallOnes(streams: readonly Stream[]): Stream[][] {
  const batches: Stream[][] = [];
  let bytes = Infinity;
  for (const stream of streams.filter((one) => one.bytes <= SMALL.one)) {
    bytes += stream.bytes;
    if (bytes > SMALL.all) {
      batches.push([]);
      bytes = stream.bytes;
    }
    batches.at(-1)?.push(stream);
  }
  return batches.flatMap((batch) => {
    let done = 0;
    return chunks(batch.map(({ uuid }) => uuid)).map((objects) =>
      batch.slice(done, (done += objects.length)),
    );
  });
}

/** Why a stream could not be received; null if it could. */
function refusedFor({ name, receivedUuid, from }: Stream, bytes: Buffer): string | null {
  try {
    const { pass, finish } = streamCheck(
      expecting({ name, uuid: receivedUuid as string, parent: from, alone: false }),
    );
    pass(bytes, 0, bytes.length);
    finish();
    return null;
  } catch (error) {
    return (error as Error).message;
  }
}

/**
 * Reads many small streams with one process: here those that are no more than a stream, for what each is; of all others, on
 * another host, their sums. What cannot be read so is not in the result.
 */
async function readSmall(
  folder: Folder,
  verbs: StoreVerbs,
  streams: readonly Stream[],
): Promise<Map<Stream, Read>> {
  const read = new Map<Stream, Read>();
  if (verbs !== RAW) return read;
  const isHere = folder.host.ssh === null;
  for (const some of smallOnes(
    isHere ? streams.filter(({ compressed, encrypted }) => !compressed && !encrypted) : streams,
  )) {
    const given = { ...at(folder), holder: "", objects: some.map(({ uuid }) => uuid) };
    try {
      if (isHere) {
        const bytes = await askBytes(
          folder.host,
          verbs.get,
          { ...given, how: "" },
          `${folder.id}: cannot read streams`,
        );
        if (bytes.length !== some.reduce((sum, one) => sum + one.bytes, 0)) continue;
        let done = 0;
        for (const stream of some) {
          const own = bytes.subarray(done, (done += stream.bytes));
          read.set(stream, {
            sha256: createHash("sha256").update(own).digest("hex"),
            refused: refusedFor(stream, own),
          });
        }
      } else {
        const sums = [
          ...(
            await ask(
              folder.host,
              verbs.get,
              { ...given, how: "sum" },
              `${folder.id}: cannot read streams`,
            )
          ).matchAll(/^[0-9a-f]{64}/gm),
        ];
        if (sums.length === some.length)
          some.forEach((stream, i) =>
            read.set(stream, { sha256: sums[i]?.[0] ?? "", refused: null }),
          );
      }
    } catch (error) {
      if (!(error instanceof Failure)) throw error; // each is read by itself then, and told of
    }
  }
  return read;
}

/** Reads every stored stream, and compares it with its checksum object. Returns how many could be read. */
async function verifyStreams(
  folder: Folder,
  store: Store,
  o: VerifyOptions,
  report: Report,
): Promise<number> {
  const { id } = folder;
  const { verbs } = store;
  const all = byUuid(store.streams);
  const asked = store.streams.filter(({ name }) =>
    o.snapshot !== null
      ? name === o.snapshot
      : o.prefix === null || parseName(name, o.prefix) !== null,
  );
  const streams =
    o.snapshot === null ? asked : [...new Set(asked.flatMap((stream) => chainOf(stream, all)))];
  const failed = (stream: Stream, what: string) => {
    const lost = store.streams
      .filter((other) => other.readonly && chainOf(other, all).includes(stream))
      .map(({ name }) => name);
    report.error(
      id,
      new Failure(
        `${stream.uuid} ${what}${lost.length > 0 ? `; not to be restored: ${lost.slice(0, 5).join(", ")}${lost.length > 5 ? `, and ${lost.length - 5} more` : ""}` : ""}`,
      ),
    );
  };
  if (streams.length === 0)
    report.error(
      id,
      new Failure(
        o.snapshot === null ? "there are no streams" : `there is no stream of ${o.snapshot}`,
      ),
    );
  for (const stream of streams.filter((one) => one.stored && !one.readonly))
    failed(stream, `cannot be restored: ${missingFor(stream, folder)}`);
  for (const stream of streams.filter(({ summed }) => !summed))
    if (stream.stored || store.unsummed.includes(stream)) failed(stream, "has no checksum object");
  for (const objects of store.debris.values())
    for (const object of objects)
      report.warning(`${id}: ${object} is what a broken transfer left; the next run removes it`);
  const summed = streams.filter((stream) => stream.summed);
  const sums = await readSums(folder, verbs, summed);
  const small = await readSmall(folder, verbs, summed);
  for (const stream of summed) {
    log.info(`Reading ${stream.name} in ${id}`);
    const read = small.get(stream) ?? (await readStream(folder, verbs, stream));
    if ("problem" in read) {
      failed(stream, read.problem);
      continue;
    }
    const { sha256, refused } = read;
    const equal = sha256 === sums.get(stream.uuid);
    report.event("verify", {
      location: id,
      name: stream.name,
      equal,
      sha256,
      differences: equal ? [] : [stream.uuid],
    });
    if (equal && refused !== null)
      failed(stream, `has the right SHA-256, but cannot be received: ${refused}`);
    else if (equal) log.info(`${stream.name} in ${id} is as it was stored (SHA-256 ${sha256})`);
    else
      failed(
        stream,
        `is damaged: it has the SHA-256 ${sha256}, and should have ${sums.get(stream.uuid) ?? "one"}`,
      );
  }
  return summed.length;
}

// The words that `stat` prints of a path; sha256sum and getfattr tell the rest.
const STAT_FORMAT = "%n\\0%f\\0%u:%g\\0%s\\0%.9Y\\0%t:%T\\0%i\\0%N\\0";

/** What a stream carries of a file besides its contents and attributes; what has no meaning for its type is left out. */
export type FileState = {
  readonly type: string;
  readonly mode: string;
  readonly owner: string;
  readonly mtime: string;
  readonly size?: string;
  readonly device?: string;
  readonly target?: string;
};

/** printf's format of a word of what it prints. */
const WORD = "%s\\0";

/** Reads the words of STAT_FORMAT. Errors: Failure for any other shape. */
export function parseStats(
  words: readonly string[],
): { path: string; inode: string; state: FileState }[] {
  const files: { path: string; inode: string; state: FileState }[] = [];
  for (let i = 0; i < words.length; i += 8) {
    const [
      path = "",
      mode = "",
      owner = "",
      size = "",
      mtime = "",
      device = "",
      inode = "",
      shown,
    ] = words.slice(i, i + 8);
    if (shown === undefined || !/^[0-9a-f]+$/.test(mode))
      throw new Failure(`cannot read what "stat" printed: ${words.slice(i, i + 8).join(" ")}`);
    const bits = parseInt(mode, 16);
    const type =
      {
        1: "fifo",
        2: "character device",
        4: "directory",
        6: "block device",
        8: "file",
        10: "symbolic link",
        12: "socket",
      }[bits >> 12] ?? "unknown";
    const special = type.endsWith("device")
      ? { device }
      : type === "symbolic link"
        ? {
            target: shown.slice(
              shown.startsWith(`'${path}' -> `) ? path.length + 6 : shown.indexOf(" -> ") + 4,
            ),
          }
        : type === "file"
          ? { size }
          : {};
    files.push({
      path,
      inode,
      state: { type, mode: (bits & 0o7777).toString(8), owner, mtime, ...special },
    });
  }
  return files;
}

/** Reads what `listing` printed: for each path all that a stream carries of it. */
export function parseListing(text: string): Map<string, Record<string, string | undefined>> {
  const words = text.split("\0");
  const [stats, sums] = [words.indexOf(""), words.indexOf("", words.indexOf("") + 1)];
  const contents = new Map(
    words.slice(stats + 1, sums).map((line) => [line.slice(66), line.slice(0, 64)]),
  );
  const attributes = new Map(
    words
      .slice(sums + 1)
      .join("\0")
      .split("\n\n")
      .map((block) => {
        const [file = "", ...values] = block.replace(/^\n+/, "").split("\n");
        return [
          file
            .replace("# file: ", "")
            .replace(/\\([0-7]{3})/g, (_, octal: string) =>
              String.fromCharCode(parseInt(octal, 8)),
            ),
          values.sort().join(" "),
        ];
      }),
  );
  const firsts = new Map<string, string>();
  return new Map(
    parseStats(words.slice(0, stats)).map(({ path, inode, state }) => {
      const linked =
        state.type === "directory"
          ? undefined
          : (firsts.get(inode) ?? (firsts.set(inode, path), undefined));
      // The top's own mtime is not carried by incremental streams.
      const { mtime, ...rest } = state;
      return [
        path,
        {
          ...rest,
          ...(path === "." ? {} : { mtime }),
          "hard link to": linked,
          contents: contents.get(path),
          attributes: attributes.get(path) ?? attributes.get(path.replace(/^\.\//, "")),
        },
      ];
    }),
  );
}

/** Bytes that were read as latin1, so that different ones stay different. */
const asText = (latin1: string) => Buffer.from(latin1, "latin1").toString();

/** What differs between two trees, and how: a line for each path. */
async function compare(...sides: readonly [Folder, Snapshot][]): Promise<string[]> {
  const listed = async ([folder, { name }]: [Folder, Snapshot]) =>
    Buffer.from(
      await ask(
        folder.host,
        LISTING,
        { ...at(folder), snapshot: name, format: STAT_FORMAT },
        `${folder.id}: cannot list ${name}`,
      ),
      "base64",
    ).toString("latin1");
  const texts = await Promise.all(sides.map(listed));
  const [a, b] = texts.map(parseListing) as [
    ReturnType<typeof parseListing>,
    ReturnType<typeof parseListing>,
  ];
  const lines = [...new Set([...a.keys(), ...b.keys()])].sort().flatMap((path) => {
    const [x, y] = [a.get(path), b.get(path)];
    const shown = /[\x00-\x1f\x7f]/.test(path) ? JSON.stringify(asText(path)) : asText(path);
    if (x === undefined || y === undefined)
      return [`${shown} is only in ${sides[x === undefined ? 1 : 0]?.[0].id}`];
    const how = [...new Set([...Object.keys(x), ...Object.keys(y)])].filter(
      (key) => x[key] !== y[key],
    );
    return how.length > 0
      ? [
          `${shown}: ${how.map((key) => (key === "contents" || key === "attributes" ? key : `${key} ${asText(x[key] ?? "none")} and ${asText(y[key] ?? "none")}`)).join(", ")}`,
        ]
      : [];
  });
  return lines.length > 0
    ? lines
    : [
        `extended attributes or ACLs${texts.some((text) => text.endsWith("missing\n")) ? "; install attr on both sides to see of what" : ""}`,
      ];
}

/** What was seen of a file: a row for each run of snapshots in which it was the same, or was not there. */
export type Version = {
  readonly first: string;
  last: string;
  readonly state: FileState | null;
  readonly names: string[];
  readonly columns: Set<number>;
};

/** `seen`: oldest first, what each snapshot has of the file, and the columns that have the snapshot. */
export function versionsAmong(
  seen: readonly {
    readonly name: string;
    readonly state: FileState | null;
    readonly columns: readonly number[];
  }[],
): Version[] {
  const rows: Version[] = [];
  for (const { name, state, columns } of seen) {
    const last = rows.at(-1);
    if (last === undefined || JSON.stringify(last.state) !== JSON.stringify(state)) {
      if (last !== undefined || state !== null)
        rows.push({ first: name, last: name, state, names: [name], columns: new Set(columns) });
      continue;
    }
    last.last = name;
    last.names.push(name);
    for (const column of columns) last.columns.add(column);
  }
  return rows;
}

export type VersionsOptions = ReturnType<typeof versionsOptions>;

/** Shows every version of a file that a snapshot or backup still has, or copies one back. */
export async function versions(o: VersionsOptions, report: Report): Promise<void> {
  const host = hostOf(o.file.host, o.hosts);
  const [root = "", inner = ""] = (
    await ask(host, LOCATE, { file: o.file.path }, `${o.file.id}: cannot find its subvolume`)
  ).split("\0");
  const source = {
    ...o.file,
    path: root,
    id: o.file.id.slice(0, o.file.id.length - o.file.path.length) + root,
  };
  // One place that has the version is enough to give it back.
  const heard =
    o.get === null
      ? report
      : { ...report, error: (_: unknown, { message }: Error) => report.warning(message) };
  const opened = await openColumns(
    source,
    o.locations,
    o.locations.length === 0,
    o,
    heard as Report,
  );
  const columns = opened.filter(({ folder }) => folder?.store == null);
  for (const { id } of opened.filter(({ folder }) => folder?.store))
    log.info(`${id} is not looked into: it has streams, which must be restored first`);
  // A source that is lost altogether is known to its backups.
  const lost = columns[0]?.folder?.snapshots.length
    ? undefined
    : columns
        .map(({ folder }) => folder?.chain.owner)
        .find((owner) => owner !== undefined && isWithin(o.file.path, owner.path));
  const path =
    lost === undefined
      ? normalize(inner)
      : o.file.path.slice(lost.path === "/" ? 0 : lost.path.length);
  const states = await Promise.all(
    columns.map(
      async ({ folder }) =>
        new Map(
          folder === null
            ? []
            : await statesIn(
                folder.host,
                at(folder),
                path,
                wholeIn(folder).map(({ name }) => name),
              ),
        ),
    ),
  );
  const seen = align(columns.map(({ folder }) => folder)).flatMap(({ cells }) => {
    const whole = cells.flatMap((cell, i) =>
      cell?.state === "whole" ? [{ i, name: cell.entry.name, time: cell.entry.time }] : [],
    );
    const [one] = whole;
    return one === undefined
      ? []
      : [
          {
            name: one.name,
            time: one.time,
            state: states[one.i]?.get(one.name) ?? null,
            columns: whole.map(({ i }) => i),
          },
        ];
  });
  if (o.get !== null) return getVersion(o, o.get, host, path, columns, seen, report);
  const rows = versionsAmong(seen)
    .reverse()
    .map((row) => ({ ...row, columns: [...row.columns].sort((a, b) => a - b) }));
  const live = columns[0]?.folder?.source;
  const now = live
    ? ((await statesIn(host, { folder: live.path, fsid: `${live.fsid}/` }, path, ["."])).get(".") ??
      null)
    : undefined;
  for (const { first, last, state, columns: at, names } of rows)
    report.event("version", {
      first,
      last,
      state,
      snapshots: names,
      locations: at.map((i) => columns[i]?.id),
    });
  if (!o.json && rows.length > 0) {
    const cells = rows.map(({ first, last, state, columns: at }, i) => {
      const same =
        i === 0 && now !== undefined && JSON.stringify(now) === JSON.stringify(state)
          ? " (as it is now)"
          : "";
      const what =
        state === null
          ? ["deleted", "-"]
          : [
              state.size === undefined ? state.type : inBytes(Number(state.size)),
              stamp(new Date(Number(state.mtime) * 1000)).replace(
                /(....)(..)(..)-(..)(..)(..)/,
                "$1-$2-$3 $4:$5:$6",
              ),
            ];
      return [first, last, ...what, at.map(letter).join(" ") + same];
    });
    print(
      `${columns.map((column, i) => `${letter(i)}  ${column.id}${whyEmpty(column)}\n`).join("")}\n${table([["FIRST IN", "LAST IN", "SIZE", "MODIFIED", "WHERE"], ...cells])}`,
    );
  }
  if (rows.length === 0)
    report.error(
      null,
      new Failure(
        seen.length === 0
          ? `${o.file.id}: there are no snapshots of ${source.id}`
          : `${o.file.id} is in none of ${count(seen.length, "snapshot")} of ${source.id}`,
      ),
    );
  report.event("summary", { ok: !report.failed, versions: rows.length });
}

/** What `stat` says of a path in many subvolumes of a folder; nothing where it is not. */
async function statesIn(
  host: Host,
  folder: ReturnType<typeof at>,
  path: string,
  names: readonly string[],
): Promise<Map<string, FileState>> {
  const found = new Map<string, FileState>();
  for (const some of chunks(names)) {
    const words = (
      await ask(
        host,
        VERSIONS,
        { ...folder, format: STAT_FORMAT, word: WORD, inner: path, names: some },
        `cannot look for ${path}`,
      )
    ).split("\0");
    const end = words.indexOf("");
    const [mode, place = "", ...paths] = words.slice(0, end);
    if (mode !== "fenced" && !(mode === "open" && /^\/[^\n]*$/.test(place)))
      throw new Failure(`cannot look for ${path}: GNU realpath not found: install coreutils`);
    const real = new Set(paths);
    for (const { path: there, state } of parseStats(words.slice(end + 1, -1))) {
      const name = there.slice(0, there.length - path.length);
      if (mode === "fenced" || real.has(withoutSlash(join(place, name, dirname(path)))))
        found.set(name, state);
    }
  }
  return found;
}

/** Copies a version of a file back to its host. */
async function getVersion(
  o: VersionsOptions,
  get: string,
  host: Host,
  path: string,
  columns: readonly Column[],
  seen: readonly {
    name: string;
    time: number;
    state: FileState | null;
    columns: readonly number[];
  }[],
  report: Report,
): Promise<void> {
  const dated = /^\d{4}-/.test(get) ? parseWhen(get) : null;
  const found = seen.findLast(
    ({ name, time, state }) => state !== null && (dated === null ? name === get : time <= dated),
  );
  if (found === undefined)
    throw new Failure(
      `${o.file.id}: ${dated === null ? `not in a snapshot ${get}` : "in no snapshot from that time or before"}`,
    );
  const having = found.columns.map((i) => columns[i]?.folder as Folder);
  const folder = having.find((one) => sameHost(one.host, host)) ?? (having[0] as Folder);
  const to = o.to ?? `${o.file.path}.${found.name}`;
  const put = {
    directory: dirname(to),
    name: basename(to),
    force: o.force ? "force" : "",
    base: basename(path),
  };
  const take = { ...at(folder), snapshot: found.name, inner: path };
  if (sameHost(folder.host, host))
    await ask({ ...host, fence: "try" }, PUT, { ...put, ...take }, `cannot copy ${o.file.id} back`);
  else
    await pipeline([
      staged("tar", folder.host, TAKE, take),
      staged("tar", { ...host, fence: "try" }, PUT, put),
    ]);
  log.info(`Copied ${path.slice(1)} as it was in ${found.name} of ${folder.id} to ${to}`);
  report.event("get", { location: folder.id, name: found.name, path: to });
  report.event("summary", { ok: !report.failed });
}

export type UnpinOptions = Pick<
  RunOptions,
  "source" | "snapshotFolder" | "prefix" | "hosts" | "wait"
> & { readonly locations: readonly string[]; readonly all: boolean };

/** Makes a source forget destinations, so that nothing is kept for them. */
export async function unpin(o: UnpinOptions, report: Report): Promise<void> {
  const source = await openFinished({ ...o, dryRun: false, adopt: false, fsChecks: true });
  try {
    if (source.record.unreadable !== null) {
      if (!o.all)
        throw new Failure(
          `${source.path}/.btrfs-backup.json cannot be read (${source.record.unreadable}); --all moves it aside`,
        );
      const suffix = stamp(new Date());
      await ask(
        source.host,
        ASIDE,
        { ...at(source), suffix },
        `cannot move ${source.path}/.btrfs-backup.json aside`,
      );
      log.info(`Moved ${source.path}/.btrfs-backup.json to .btrfs-backup.json.${suffix}`);
      return;
    }
    const known = knownDestinations(source);
    const ids = known.map(({ location }) => location);
    for (const id of o.locations)
      if (!ids.includes(id))
        report.error(
          id,
          new Failure(`not known at ${o.source.id}; known are: ${ids.join(", ") || "none"}`),
        );
    const destinations = known.filter(({ location }) => !o.all && !o.locations.includes(location));
    await writeRecord(source, { ...source.owned, destinations });
    log.info(`Unpinned ${count(known.length - destinations.length, "destination")}`);
  } finally {
    await whileCleaning(source.close);
  }
}

// ── 8. Guard ─────────────────────────────────────────────────────────────────────────────
// The forced command of an ssh key that may do no more than its options say. All of the boundary is here, in the order in
// which it meets a command: reading it, the rules of arguments, the rules of verbs and what they look at again, what is
// left out of an answer, and the stream. Whatever does not fit is refused before anything has run.

// ── reading a command ──

/** How a command may begin: where it runs is ours to say. */
const BEGINNINGS = [/^sh -c/, new RegExp(`^${UNSHARE} sh -c`), /^nsenter -t \d{1,9} -m -- sh -c/];

/** The words behind `sh -c`, each quoted as `quote` does. Errors: Refused for any other text. */
function wordsOf(text: string): string[] {
  const notOurs = "this is no command of btrfs-backup";
  const beginning = BEGINNINGS.map((one) => one.exec(text)?.[0]).find(
    (found) => found !== undefined,
  );
  if (beginning === undefined || /[\n\r\0]/.test(text)) return refuse(notOurs);
  const words: string[] = [];
  const word = / '([^'\\!]*(?:'\\['\\!]'[^'\\!]*)*)'/y;
  for (word.lastIndex = beginning.length; word.lastIndex < text.length;) {
    const [, quoted = ""] = word.exec(text) ?? refuse(notOurs);
    words.push(quoted.replace(/'\\(.)'/g, "$1"));
  }
  return words;
}

/** The verb and its arguments in the text that a run sent over ssh. Nothing else of it is used. Errors: Refused for any other text. */
export function parseCommand(text: string): { name: string; sudo: boolean; args: string[] } {
  const words = wordsOf(text);
  // TRY runs a script with a title; it says the mode itself.
  const [title = "", mode = "", ...args] =
    words[1] === TRYING ? [words[3] ?? "", "", ...words.slice(4)] : words.slice(1);
  const name = /^btrfs-backup:([a-z-]+)$/.exec(title)?.[1];
  if (name === undefined || !["", "sudo", "fence"].includes(mode))
    return refuse("this is no command of btrfs-backup");
  return { name, sudo: mode === "sudo", args };
}

/** What a key may do, by the option that gives it the right. */
const RIGHTS = {
  add: "a key without --source",
  source: "--source",
  read: "--allow-read",
  delete: "--allow-delete",
} as const;
type Right = keyof typeof RIGHTS;

export type GuardOptions = ReturnType<typeof guardOptions>;

/** What the arguments of a guarded verb have said so far. */
type Guarded = { readonly o: GuardOptions; folder: string; prefix: string };

/** Reads an ssh command, and checks all of it; `serve` runs it, and returns the exit status. Errors: Refused. */
export async function permitted(
  text: string,
  o: GuardOptions,
): Promise<{ verb: Declared; args: string[]; serve: () => Promise<number> }> {
  const { name, args } = parseCommand(text);
  const { verb, rights, least, most, check } = GUARDED.get(name) ?? refuse(`the verb ${name}`);
  const granted: readonly Right[] = [
    o.source ? "source" : "add",
    ...(o.allowRead ? ["read" as const] : []),
    ...(o.allowDelete ? ["delete" as const] : []),
  ];
  if (!rights.some((right) => granted.includes(right)))
    refuse(`${name} needs ${rights.map((right) => RIGHTS[right]).join(" or ")}`);
  if (args.length < least || args.length > most)
    refuse(`${name} with ${args.length} arguments, as another version has them`);
  return { verb, ...(await check(args, { o, folder: "", prefix: "" })) };
}

// ── rules of arguments ──

/** Checks an argument, and returns what is used in its place. Errors: Refused. */
type ArgumentRule = (value: string, said: Guarded) => string;

const shown = (value: string) =>
  JSON.stringify(value.length > 100 ? `${value.slice(0, 100)}…` : value);
const like =
  (shape: RegExp): ArgumentRule =>
  (value) =>
    shape.test(value) ? value : refuse(`the argument ${shown(value)}`);
const oneOf =
  (...words: readonly string[]): ArgumentRule =>
  (value) =>
    words.includes(value) ? value : refuse(`the argument ${shown(value)}`);
/** An argument may be empty, or else is bound to a rule. */
const perhaps =
  (rule: ArgumentRule): ArgumentRule =>
  (value, said) =>
    value === "" ? "" : rule(value, said);
const notGiven: ArgumentRule = (value) => refuse(`the argument ${shown(value)}`);

const NONCE = like(/^[0-9a-f-]{36}$/);
const LOCK_WAIT = like(/^(look|later|\d{1,6})$/);
const SECONDS = like(/^\d{1,4}$/);
const FSID = like(/^[0-9a-f]{1,16}(\/\d{0,9})?$/);
const HOLDER = like(/^\d{0,9}$/);
const LEVEL = like(/^(1?\d)?$/);
const FLAG = oneOf("-q", "-vv");
const BYTES = like(/^\d{1,18}$/);
const UUID_BYTES = like(/^[0-9a-f]{32}$/);
const SHA256 = like(/^[0-9a-f]{64}$/);
const ONE_LINE = like(/^[^\n\r\0]*$/);

const isOurs = (name: string) =>
  /^\.btrfs-backup|^\.outstanding_transfers$|\.part$|\.btrfs(\.|$)/.test(name);

const isSubvolume = (path: string) => {
  const found = lstatSync(path, { throwIfNoEntry: false });
  return found?.isDirectory() === true && found.ino === 256;
};

/** btrfs says EROFS of a read-only subvolume whoever asks. */
function isReadonlySubvolume(path: string): boolean {
  if (!isSubvolume(path)) return false;
  try {
    accessSync(path, constants.W_OK);
    return false;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EROFS";
  }
}

/** A path without symbolic links, as far as it exists. */
function resolvedPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path === "/" ? path : join(resolvedPath(dirname(path)), basename(path));
  }
}

/** A place that the key may use: below one of the paths, and not inside of a backup. */
const PLACE_RULE: ArgumentRule = (value, said) => {
  if (!value.startsWith("/") || /[\n\r\0]/.test(value) || value !== withoutSlash(normalize(value)))
    refuse(`the path ${shown(value)}`);
  const real = resolvedPath(value);
  const within = said.o.paths.map(resolvedPath).find((path) => isWithin(real, path));
  if (within === undefined)
    return refuse(`${shown(value)} is not below ${said.o.paths.join(" or ")}`);
  for (let at = real; at !== within; at = dirname(at)) {
    if (isOurs(basename(at))) refuse(`${shown(value)} has a name that this program uses`);
    if (prefixOf(basename(at)) !== null || isReadonlySubvolume(at))
      refuse(`${shown(value)} is inside of a backup`);
  }
  said.folder = real;
  return real;
};

/** A subvolume that can be backed up; the place stays what it was. */
const SOURCE_RULE: ArgumentRule = (value, said) => {
  const { folder } = said;
  if (!said.o.source) refuse("it is not for sources");
  const source = PLACE_RULE(value, said);
  said.folder = folder;
  return source;
};

const PREFIX_RULE: ArgumentRule = (value, said) => {
  if (!isPrefix(value) || value.includes("\ufffd")) refuse(`the prefix ${shown(value)}`);
  said.prefix = value;
  return value;
};

const DATED: ArgumentRule = (value) =>
  prefixOf(value) !== null && !/[/\n\r\0]/.test(value) ? value : refuse(`the name ${shown(value)}`);

/** A read-only subvolume of the folder: no link, and nothing that is being received. */
const STANDING: ArgumentRule = (value, { folder }) =>
  entryName(value) !== null && isReadonlySubvolume(join(folder, value))
    ? value
    : refuse(`${shown(value)} is no snapshot in ${folder}`);
const LISTED_NAME: ArgumentRule = (value, said) =>
  value.startsWith("./")
    ? `./${STANDING(value.slice(2), said)}`
    : refuse(`the argument ${shown(value)}`);

const isObject = (value: string) => STREAM.test(value) && !/[/\n\r\0]/.test(value);
const OBJECT: ArgumentRule = (value, { prefix }) =>
  isObject(value) && parseName(STREAM.exec(value)?.[1] ?? "", prefix) !== null
    ? value
    : refuse(`the object ${shown(value)}`);
/** An object, what belongs to it, or was to become it. */
const ANY_OBJECT: ArgumentRule = (value) =>
  isObject(value.replace(/^\.(.*)\.part$/s, "$1").replace(/\.sha256$|\.p[0-2]-\d*$/, ""))
    ? value
    : refuse(`the object ${shown(value)}`);
/** An object, or what is kept of one to go on from. */
const PART_RULE: ArgumentRule = (value, said) => {
  OBJECT(value.replace(/\.p[0-2]-\d*$/, ""), said);
  return value;
};

/** A path in a snapshot. */
const INNER: ArgumentRule = (value) =>
  value.startsWith("/") && value === normalize(value) && !/[\n\r\0]/.test(value)
    ? value
    : refuse(`the path ${shown(value)}`);

/** A folder that was opened. */
const AT = { folder: PLACE_RULE, fsid: FSID };
/** A line of the record: what `record` replaces is checked as a whole. */
const RECORDED = {
  header: oneOf("", RECORD_HEADER),
  key: like(/^(,"[^\n\r\0]*": )?$/),
  value: ONE_LINE,
};

// ── rules of verbs ──

/** A rule for every parameter of a verb; that of `names...` is for each. */
type Rules<V> = { readonly [Name in keyof ArgumentsOf<V>]-?: ArgumentRule };

/**
 * What a verb is bound to beyond the shape of its arguments. `again`: what is looked at again, as the place is now; it returns
 * the arguments that are used. `serve`: how it is run, if not as it is. Errors: Refused.
 */
type Beyond<V> = {
  readonly again?: (given: ArgumentsOf<V>, said: Guarded) => Promise<ArgumentsOf<V>>;
  readonly serve?: (given: ArgumentsOf<V>, said: Guarded) => Promise<number>;
};

/** How a guarded key may use a verb: with one of these rights, and so many arguments, if `check` accepts them. */
type Use = {
  readonly verb: Declared;
  readonly rights: readonly Right[];
  readonly least: number;
  readonly most: number;
  readonly check: (
    words: readonly string[],
    said: Guarded,
  ) => Promise<{ args: string[]; serve: () => Promise<number> }>;
};

function use<V extends Declared>(
  verb: V,
  rights: readonly Right[],
  rules: Rules<V>,
  beyond: Beyond<V> = {},
): [string, Use] {
  const parameters = parametersOf(verb);
  const ruleOf = (name: string) => rules[name as keyof Rules<V>];
  const serve = beyond.serve ?? (async (given) => (await started(verb, given)).exitCode ?? 1);
  const check = async (words: readonly string[], said: Guarded) => {
    const checked: Record<string, string | string[]> = {};
    for (const [i, { name, kind }] of parameters.entries()) {
      const [word] = words.slice(i);
      if (kind === "...") checked[name] = words.slice(i).map((one) => ruleOf(name)(one, said));
      else if (word !== undefined) checked[name] = ruleOf(name)(word, said);
    }
    const given = checked as ArgumentsOf<V>;
    const used = beyond.again === undefined ? given : await beyond.again(given, said);
    return { args: wordsFor(verb, used), serve: () => serve(used, said) };
  };
  const least = parameters.filter(({ kind }) => kind === "").length;
  const most = parameters.some(({ kind }) => kind === "...") ? Infinity : parameters.length;
  return [verb.name, { verb, rights, least, most, check }];
}

/** Runs a verb for a guarded key, behind the fence. */
function started<V extends Declared>(
  verb: V,
  given: ArgumentsOf<V>,
  [stdin, stdout, stderr]: readonly ("inherit" | "pipe")[] = [],
): ProcessPromise {
  const host: Host = { ...LOCAL, fence: "own" };
  const child = shell({
    stdio: [stdin ?? "inherit", stdout ?? "inherit", stderr ?? "inherit"],
    env: { PATH: process.env["PATH"] ?? "" },
    detached: true,
  })`${`exec ${commandWith(host, verb, given)}`}`;
  running.add(() => sendSignal(-(child.pid as number), "SIGKILL"));
  return child;
}

/** Reads what the folder of a guarded verb has. */
async function lookedAt(
  { folder: path, prefix }: Guarded,
  kind: "folder" | "raw",
): Promise<Folder> {
  const folder = await openFolder({ kind, id: path, host: null, path }, path, {
    prefix,
    wait: "look",
    hosts: { sshOptions: [], sudo: false, sshSudo: false },
  });
  await folder.close();
  return folder;
}

const GUARDED_CHAINS = 200;

/** A chain's record as a guarded key may write it. Errors: Refused for what would take anything away from what is there. */
export function guardedRecord(
  text: string,
  {
    chain: now,
    entries,
    standing,
    prefix,
  }: Pick<Folder, "chain" | "entries" | "standing" | "prefix">,
  source: boolean,
): ChainRecord {
  const { chains, unreadable } = parseRecord(`${RECORD_HEADER}\n${recordKey(prefix)}${text}\n}`);
  const chain = chains.get(prefix);
  if (
    chain === undefined ||
    unreadable !== null ||
    Object.keys(chain).some(
      (key) =>
        ![
          "owner",
          "receiving",
          "since",
          "strangers",
          "elders",
          "destinations",
          "leaps",
          "belated",
          "guarded",
        ].includes(key),
    )
  )
    return refuse("a record of another form");
  const full = asRead(chain, standing, prefix);
  const { owner, receiving, strangers = [], destinations } = full;
  if (now.elders !== undefined && JSON.stringify(chain.elders) !== JSON.stringify(now.elders))
    refuse("a record with other strangers");
  if ((chain.elders?.until ?? 0) > Math.max(0, ...standing.map(({ id }) => id)))
    refuse("a record of backups that are not there yet");
  // An administrator's terminal will show it.
  if (/[\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|\\u00[01]|\\[bfnrt]/.test(text))
    refuse("a record with control characters");
  if (
    receiving !== undefined &&
    receiving !== now.receiving &&
    (parseName(receiving, prefix) === null || entries.has(receiving))
  )
    refuse(`an announcement of ${shown(receiving)}`);
  // Whose the backups are, and which are not, is settled once; a restored source has another UUID.
  const settled = now.owner !== undefined;
  if (settled && (owner?.host !== now.owner?.host || owner?.path !== now.owner?.path))
    refuse("a record with another owner: --adopt is for the server");
  const foreign = new Set(strangers);
  if (
    now.strangers?.some((uuid) => !foreign.has(uuid)) ||
    (settled && strangers.length !== (now.strangers ?? []).length)
  )
    refuse("a record with other strangers");
  const same = JSON.stringify(destinations) === JSON.stringify(now.destinations);
  if (!same && !source) refuse("a record with other destinations");
  if (!source && JSON.stringify(chain.leaps) !== JSON.stringify(now.leaps))
    refuse("a record with other leaps of the clock: --adopt-clock is for the server");
  // Since when a name is announced is the server's to know. Destinations are the key's word only: nobody's --locked-dests may go by them.
  const { since: _, ...said } = full;
  const known =
    receiving !== undefined && receiving === now.receiving && now.since !== undefined
      ? { since: now.since }
      : {};
  return { ...said, ...known, ...(now.guarded || !same ? { guarded: true as const } : {}) };
}

/** A key's chains are another machine's: what is backed up here, or stands here, is not their source. Errors: Refused. */
function notFromHere({ owner }: ChainRecord, { place, subvolumes }: Folder, { o }: Guarded): void {
  if (o.source || owner === undefined) return;
  if (owner.uuid === place.filesystem || subvolumes.some(({ uuid }) => uuid === owner.uuid))
    refuse("a record with an owner that is on this filesystem");
}

/** The line of the record that a verb writes, if it writes one. Errors: Refused. */
function recordedLine(
  { header, value }: { readonly header: string; readonly value: string },
  folder: Folder,
  said: Guarded,
): typeof NO_RECORD | ReturnType<typeof recordArguments> {
  if (header === "") return NO_RECORD;
  if (folder.record.unreadable !== null) refuse("a record that cannot be read is not written");
  if (folder.record.chains.size >= GUARDED_CHAINS && !folder.record.chains.has(folder.prefix))
    refuse("more prefixes than a guarded key can have in a folder");
  const chain = guardedRecord(value, folder, said.o.source);
  notFromHere(chain, folder, said);
  return recordArguments(folder, chain);
}

/** Only what the record's own rules allow: see guardedRecord. */
async function recordAgain(
  given: ArgumentsOf<typeof WRITE_RECORD>,
  said: Guarded,
): Promise<typeof given> {
  const prefix = /^,("(?:[^"\\]|\\.)*"): $/.test(given.key)
    ? (JSON.parse(given.key.slice(1, -2)) as string)
    : "/";
  PREFIX_RULE(prefix, said);
  if (given.header === "") refuse("a record without a header");
  return { ...given, ...recordedLine(given, await lookedAt(said, "folder"), said) };
}

/** Only what the record says is left of a broken transfer; of one that was refused before it began, nothing is. */
async function discardServed(given: ArgumentsOf<typeof DISCARD>, said: Guarded): Promise<number> {
  const folder = await lookedAt(said, "folder");
  if (folder.chain.receiving === undefined && !folder.entries.has(given.name)) return 0;
  if (folder.chain.receiving !== given.name)
    refuse(`${given.name} was not left by a broken transfer`);
  if (given.how === "whole" && !doubtedIn(folder).has(given.name)) refuse(`${given.name} is whole`);
  return (await started(DISCARD, { ...given, ...recordedLine(given, folder, said) })).exitCode ?? 1;
}

/** No stream takes another's name or UUID: of two with the same data either can stand for it, and what builds on it would build on the new one. */
async function commitAgain(given: ArgumentsOf<CommitVerb>, said: Guarded): Promise<typeof given> {
  const { object } = given;
  const { entries, store } = await lookedAt(said, "raw");
  if (entries.has(object) || entries.has(object + SUM)) refuse(`${object} is there`);
  const uuid = STREAM.exec(object)?.[8] ?? "";
  if (store?.streams.some((stream) => stream.readonly && stream.receivedUuid === uuid))
    refuse(`${uuid} is stored already`);
  return { ...given, part: given.part ?? "", kept: given.kept ?? "", uuid };
}

/** Without --allow-delete, only what broken transfers left. */
async function dropAgain(given: ArgumentsOf<DropVerb>, said: Guarded): Promise<typeof given> {
  const { store } = await lookedAt(said, "raw");
  const debris = new Set(
    [...(store?.debris.entries() ?? [])].flatMap(([name, objects]) =>
      parseName(name, said.prefix) === null ? [] : objects,
    ),
  );
  const whole = given.objects.find((one) => !debris.has(one));
  if (whole !== undefined && !said.o.allowDelete)
    refuse(`${whole} was not left by a broken transfer (--allow-delete)`);
  return given;
}

/** Never the newest snapshot of a source. */
async function deleteAgain(
  given: ArgumentsOf<typeof DELETE>,
  said: Guarded,
): Promise<typeof given> {
  const names = given.names.map((name) => DATED(name.slice(2), said));
  const { standing, top } = await lookedAt(said, "folder");
  const idOf = new Map<string, string>(standing.map(({ name, id }) => [name, String(id)]));
  if (given.top !== top || given.ids !== names.map((name) => idOf.get(name)).join(" "))
    refuse("subvolumes that are others now");
  const newest = (prefix: string) =>
    standing
      .filter(({ name, readonly }) => readonly && parseName(name, prefix) !== null)
      .reduce((last, one) => (one.id > last.id ? one : last), NO_SUBVOLUME as Entry).name;
  if (said.o.source)
    for (const name of names)
      if (newest(prefixOf(name) as string) === name) refuse(`${name} is the newest snapshot`);
  return given;
}

/** Only the newest snapshot, within its prefix. */
async function renameAgain(
  given: ArgumentsOf<typeof RENAME>,
  said: Guarded,
): Promise<typeof given> {
  const { standing } = await lookedAt(said, "folder");
  const prefix = prefixOf(given.name);
  const alike = standing.filter(({ name, readonly }) => readonly && prefixOf(name) === prefix);
  if (
    prefixOf(given.to) !== prefix ||
    alike.some(({ id }) => id > (alike.find(({ name }) => name === given.name)?.id ?? 0))
  )
    refuse(`${shown(given.name)} is not the newest snapshot`);
  return given;
}

/** Whether a path of a snapshot is reached there without following links. */
const isInside = (snapshot: string, path: string) =>
  path
    .split("/")
    .slice(1, -1)
    .every(
      (_, i, all) =>
        !lstatSync(join(snapshot, ...all.slice(0, i + 1)), {
          throwIfNoEntry: false,
        })?.isSymbolicLink(),
    );

/** Only snapshots in which the path leads through no link. */
async function versionsAgain(
  given: ArgumentsOf<typeof VERSIONS>,
  { folder }: Guarded,
): Promise<typeof given> {
  return {
    ...given,
    names: given.names.filter((name) => isInside(join(folder, name), given.inner)),
  };
}

/** Only paths that lead through no link, on both sides. */
async function sizesAgain(
  given: ArgumentsOf<typeof FILE_SIZES>,
  { folder }: Guarded,
): Promise<typeof given> {
  const led = given.paths.find(
    (path) => ![given.snapshot, given.parent].every((name) => isInside(join(folder, name), path)),
  );
  if (led !== undefined) refuse(`the path ${shown(led)}`);
  return given;
}

/** The source itself, or a snapshot in the folder. */
const VERSION_OF: ArgumentRule = (value, said) =>
  value === "." && said.o.source ? value : STANDING(value, said);

const FILE: ArgumentRule = (value, said) => {
  PLACE_RULE(dirname(value), said);
  return INNER(value, said);
};

const RECORD_PARTS = {
  header: RECORDED.header,
  key: RECORDED.key,
  beginning: ONE_LINE,
  rest: ONE_LINE,
};
const KEPT_PART = { part: PART_RULE, sum: SHA256, bytes: BYTES, kept: BYTES };
const SOURCE_OR_NONE = perhaps(SOURCE_RULE);
const PARENT = perhaps(STANDING);

/** What a key may run. A verb that is not here is refused. */
const GUARDED: ReadonlyMap<string, Use> = new Map([
  use(
    OPEN,
    ["add", "source"],
    {
      nonce: NONCE,
      wait: LOCK_WAIT,
      folder: PLACE_RULE,
      prefix: PREFIX_RULE,
      source: SOURCE_OR_NONE,
      kind: oneOf("", "streams", "known"),
      silence: SECONDS,
    },
    { serve: openServed },
  ),
  use(CREATE, ["add", "source"], { ...AT, prefix: PREFIX_RULE }),
  use(PARENTS, ["add"], { folder: PLACE_RULE, source: oneOf(""), how: oneOf("", "look") }),
  use(
    WRITE_RECORD,
    ["add", "source"],
    { ...AT, ...RECORDED, sync: oneOf("sync") },
    { again: recordAgain },
  ),
  use(
    RECEIVE,
    ["add"],
    {
      flag: FLAG,
      ...AT,
      level: LEVEL,
      holder: HOLDER,
      prefix: PREFIX_RULE,
      ...RECORD_PARTS,
      ...KEPT_PART,
      sync: notGiven,
    },
    { serve: receiveServed },
  ),
  use(KEPT, ["add"], { ...AT, prefix: PREFIX_RULE, object: OBJECT }),
  use(TIDY, ["add"], { ...AT, prefix: PREFIX_RULE }),
  use(
    DISCARD,
    ["add"],
    { ...AT, prefix: PREFIX_RULE, name: DATED, ...RECORDED, how: oneOf("", "whole") },
    { serve: discardServed },
  ),
  use(
    RAW.put,
    ["add"],
    { ...AT, lock: PREFIX_RULE, object: PART_RULE, holder: HOLDER, size: perhaps(BYTES) },
    { serve: storeServed },
  ),
  use(
    RAW.commit,
    ["add"],
    {
      ...AT,
      lock: PREFIX_RULE,
      object: OBJECT,
      sum: SHA256,
      bytes: BYTES,
      part: PART_RULE,
      kept: BYTES,
      uuid: notGiven,
    },
    { again: commitAgain },
  ),
  use(
    RAW.delete,
    ["add", "delete"],
    { ...AT, lock: PREFIX_RULE, objects: ANY_OBJECT },
    { again: dropAgain },
  ),
  use(RAW.get, ["read"], { ...AT, how: oneOf("", "sum"), holder: HOLDER, objects: ANY_OBJECT }),
  use(
    DELETE,
    ["delete", "source"],
    {
      convert: oneOf("", "rw"),
      sync: oneOf("", "sync"),
      ...AT,
      top: ONE_LINE,
      ids: like(/^\d+( \d+)*$/),
      names: LISTED_NAME,
    },
    { again: deleteAgain },
  ),
  use(RECEIVED, ["delete", "read"], { ...AT, names: LISTED_NAME }),
  use(MADE, ["delete", "read"], AT, { serve: madeServed }),
  use(BORN, ["delete", "read"], { ...AT, names: LISTED_NAME }),
  use(SHOW, ["source"], AT),
  use(SNAPSHOT, ["source"], { source: SOURCE_RULE, ...AT, name: DATED }),
  use(RENAME, ["source"], { ...AT, name: STANDING, to: DATED }, { again: renameAgain }),
  use(SEND, ["source", "read"], {
    flag: FLAG,
    ...AT,
    level: LEVEL,
    protocol: like(/^[12]?$/),
    holder: HOLDER,
    snapshot: STANDING,
    parent: PARENT,
    skip: perhaps(BYTES),
    sum: perhaps(SHA256),
    uuid: UUID_BYTES,
    clone: perhaps(UUID_BYTES),
  }),
  use(WORK, ["add", "source", "read", "delete"], {
    group: oneOf(""),
    verb: like(/^[a-z-]{1,20}$/),
    folder: PLACE_RULE,
  }),
  use(HEADS, ["source", "read"], { ...AT, snapshots: LISTED_NAME }),
  use(BIRTHS, ["source", "read"], { ...AT, snapshots: LISTED_NAME }),
  use(ESTIMATE, ["source", "read"], { ...AT, snapshot: STANDING, parent: PARENT }),
  use(REWRITTEN, ["source", "read"], { ...AT, snapshot: STANDING, parent: STANDING }),
  use(
    FILE_SIZES,
    ["source", "read"],
    { ...AT, snapshot: STANDING, parent: STANDING, paths: INNER },
    { again: sizesAgain },
  ),
  use(SIZES, ["read"], { ...AT, names: LISTED_NAME }),
  use(DIGEST, ["read"], { ...AT, snapshot: STANDING }),
  use(LISTING, ["read"], { ...AT, snapshot: STANDING, format: oneOf(STAT_FORMAT) }),
  use(
    VERSIONS,
    ["read"],
    { ...AT, format: oneOf(STAT_FORMAT), word: oneOf(WORD), inner: INNER, names: VERSION_OF },
    { again: versionsAgain },
  ),
  use(TAKE, ["read"], { ...AT, snapshot: STANDING, inner: INNER }),
  use(LOCATE, ["read"], { file: FILE }),
]);

// ── how much a key may store ──

/** The files below a folder that count: not those in backups, and none that is reached through a link. */
function* filesBelow(folder: string): Generator<string> {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isFile()) yield path;
    else if (entry.isDirectory() && prefixOf(entry.name) === null) yield* filesBelow(path);
  }
}

/** Opens a file. Errors: Refused for what is not a plain one. */
function openedPlain(path: string): number {
  try {
    const file = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    return fstatSync(file).isFile() ? file : refuse(`${shown(path)} is not a plain file`);
  } catch (error) {
    if (error instanceof Refused) throw error;
    return refuse(`${shown(path)} cannot be read: ${(error as Error).message}`);
  }
}

/** Bytes of what a broken transfer has left of a subvolume. */
function leftoverBytes(path: string): number {
  if (!isSubvolume(path) || isReadonlySubvolume(path)) return 0;
  // Data that are in memory only are not told.
  const script = `btrfs filesystem sync "$1" >&2; btrfs filesystem du -s --raw "$1"`;
  const { stdout } = spawnSync("sh", ["-c", script, "sh", path], {
    encoding: "utf8",
    env: { PATH: `${process.env["PATH"] ?? ""}:/usr/sbin:/sbin`, LC_ALL: "C" },
  });
  return Number(/^\s*(\d+)\s/m.exec(stdout)?.[1] ?? 0);
}

/** The bytes of a folder's backups as its record says, as far as they still stand, and of leftovers. Errors: Refused where it cannot be read. */
function recordedBytes(path: string): number {
  const file = openedPlain(path);
  const {
    chains,
    stored = new Map<string, Stored>(),
    unreadable,
  } = parseRecord(readFileSync(file, "utf8"));
  closeSync(file);
  if (unreadable !== null) refuse(`${shown(path)} cannot be read`);
  const left = [...chains.values()].flatMap(({ receiving }) =>
    receiving === undefined || entryName(receiving) === null
      ? []
      : [join(dirname(path), receiving)],
  );
  const standing = new Set(listedNow(dirname(path)).map(({ receivedUuid }) => receivedUuid));
  const all = [...stored.values()].flatMap((one) => Object.entries(one));
  return all.reduce(
    (sum, [uuid, bytes]) => (standing.has(uuid) ? sum + bytes : sum),
    left.reduce((sum, one) => sum + leftoverBytes(one), 0),
  );
}

/** The bytes of all streams that stand below paths, or are kept in part. */
function bytesBelow(given: readonly string[]): number {
  const paths = given.map(resolvedPath);
  const files = new Set(
    paths
      .filter((path) => lstatSync(path, { throwIfNoEntry: false })?.isDirectory())
      .flatMap((path) => [...filesBelow(path)]),
  );
  let sum = 0;
  for (const path of files) {
    const name = basename(path);
    if (name === ".btrfs-backup.json") sum += recordedBytes(path);
    else if (isObject(name) || PART_OF_OBJECT.test(name))
      sum += lstatSync(path, { throwIfNoEntry: false })?.size ?? 0;
  }
  return sum;
}

/** The stream of an object, as long as it is not whole. */
const PART_OF_OBJECT = /^\..*\.btrfs(\.zst)?(\.gpg)?(\.p[0-2]-\d*)?\.part$/s;

/**
 * Lets a stream in, one after the other, as long as --max-bytes has room; `work` gets how many bytes it may have. `counted`: those that
 * are there already, and will not be there twice. Errors: Refused where there is no room.
 */
async function withinBytes(
  { paths, maxBytes }: GuardOptions,
  counted: () => number,
  work: (left: number) => Promise<number>,
): Promise<number> {
  if (maxBytes === null) return work(Infinity);
  const wait = 3600; // seconds
  const lock = spawn(
    "flock",
    [
      "-w",
      String(wait),
      lockFile(`--max-bytes\n${paths.join("\n")}`),
      "sh",
      "-c",
      "echo; exec cat >/dev/null",
    ],
    { stdio: ["pipe", "pipe", "inherit"] },
  );
  try {
    const held = await new Promise(
      (done) => lock.stdout.once("data", () => done(true)) && lock.once("close", () => done(false)),
    );
    if (!held) refuse("another transfer of this key is under way");
    const left = maxBytes - bytesBelow(paths) + counted();
    if (left <= 0) refuse(noRoom(maxBytes));
    return await work(left);
  } finally {
    lock.stdin.end();
  }
}

const noRoom = (maxBytes: number | null) =>
  `more than the ${inBytes(maxBytes ?? 0)} that --max-bytes allows this key`;

/** Remembers how many bytes a backup's stream had, and forgets those that are gone. */
async function rememberBytes(said: Guarded, uuid: string, bytes: number): Promise<void> {
  const folder = await lookedAt(said, "folder");
  const standing = new Set(folder.subvolumes.map(({ receivedUuid }) => receivedUuid));
  const stored = Object.entries(folder.record.stored?.get(said.prefix) ?? {}).filter(([one]) =>
    standing.has(one),
  );
  const value = JSON.stringify(Object.fromEntries([...stored, [uuid, bytes]]));
  if (Buffer.byteLength(value) > RECORD_BYTES)
    refuse(
      `more than the ${stored.length} backups of one prefix that --max-bytes can count: prune some`,
    );
  await ask(
    { ...LOCAL, fence: "own" },
    WRITE_RECORD,
    { ...at(folder), header: RECORD_HEADER, key: storedKey(said.prefix), value },
    `${folder.id}: cannot write .btrfs-backup.json`,
  );
}

/** Passes a stream on to a store, as much as there is room for. */
async function storeServed(given: ArgumentsOf<PutVerb>, { o }: Guarded): Promise<number> {
  if (o.maxBytes === null) return (await started(RAW.put, given)).exitCode ?? 1;
  const allowed = async () => {};
  return withinBytes(
    o,
    () => 0,
    (left) =>
      letIn(
        RAW.put,
        given,
        { stream: false, level: "", file: null, left, most: o.maxBytes },
        { begins: allowed, whole: allowed },
      ),
  );
}

// ── what is served otherwise than as it is ──

/** Serves one command of an ssh key that may do no more than its options say. Returns the exit status. */
export async function guard(o: GuardOptions): Promise<number> {
  const text = process.env["SSH_ORIGINAL_COMMAND"] ?? "";
  try {
    const { serve } = await permitted(text, o);
    checkFence();
    return await serve();
  } catch (problem) {
    const error = refusalOf(problem);
    const client = process.env["SSH_CONNECTION"]?.split(" ")[0] ?? "nobody";
    await shell`${`exec logger -t btrfs-backup -p auth.warning -- ${quote(visible(`guard refused ${client}: ${error.message}: ${JSON.stringify(text.slice(-300))}`))}`}`;
    process.stderr.write(
      `btrfs-backup guard: refused: ${visible(error.message).replaceAll("\n", " ")}\n`,
    );
    return 65;
  }
}

/** What the kernel says of a name (too long, no such file) is a refusal as well. Errors: all others. */
function refusalOf(error: unknown): Refused {
  if (error instanceof Refused) return error;
  if (typeof (error as NodeJS.ErrnoException).syscall === "string")
    return new Refused((error as Error).message);
  throw error;
}

/** Errors: Refused where no verb can work behind the fence; whether the mount is what it should be, each verb looks at itself. */
function checkFence(): void {
  if (process.getuid?.() !== 0) refuse("guard needs root, for a mount namespace of its own");
  const { status, stderr } = spawnSync("sh", ["-c", `${UNSHARE} true`], { encoding: "utf8" });
  if (status !== 0)
    refuse(`guard needs a mount namespace of its own, and there is none: ${stderr.trim()}`);
}

/** Opens a folder, and tells of it what concerns the key. */
async function openServed(given: ArgumentsOf<typeof OPEN>, said: Guarded): Promise<number> {
  const child = started(OPEN, given, ["inherit", "pipe"]);
  const output = await printed(child, `\n${given.nonce} end\n`);
  if (typeof output === "string") process.stdout.write(narrowed(output, given.nonce, said.folder));
  return (await child).exitCode ?? 1;
}

/** Tells of subvolumes in a folder when they were made. */
async function madeServed(given: ArgumentsOf<typeof MADE>, said: Guarded): Promise<number> {
  const { top } = await lookedAt(said, "folder");
  const { stdout, exitCode } = await started(MADE, given, ["inherit", "pipe"]);
  for (const [line, , , , path] of listedLines(stdout.replace(/\n$/, ""), LISTED_MADE))
    if (dirname(`/${path}`) === top) process.stdout.write(`${line}\n`);
  return exitCode ?? 1;
}

/** What `open` printed, without what concerns neither the folder nor the source. */
export function narrowed(output: string, nonce: string, folder: string): string {
  const { top, source, mounts, place } = parseInspection(output, nonce, folder);
  const mount = placeOn(mounts, place.path).mount;
  const ours = (path: string) =>
    `/${path}` === mount.root ||
    [top, ...(source === null ? [] : [source.top])].some(
      (one) => isWithin(`/${path}`, one) || isWithin(one, `/${path}`),
    );
  const near = (path: string) =>
    [place.path, ...(source === null ? [] : [source.path])].some(
      (one) => isWithin(one, path) || isWithin(path, one),
    );
  const lines: Record<string, (text: string) => string[]> = {
    subvolumes: (text) =>
      [...listedLines(text, LISTED)]
        .filter((match) => ours(match[6] as string))
        .map(([line]) => line),
    readonly: (text) =>
      [...listedLines(text, LISTED_READONLY)]
        .filter((match) => ours(match[2] as string))
        .map(([line]) => line),
    mounts: (text) => text.split("\n").filter((line) => near(parseMounts(line)[0]?.path ?? "")),
    filesystems: (text) =>
      text
        .split("\n")
        .filter((line) =>
          [place.filesystem, source?.filesystem].includes(line.slice(line.lastIndexOf("/") + 1)),
        ),
  };
  const parts = output.split(`\n${nonce} `).map((part) => {
    const [name = "", ...text] = part.replace(/\n$/, "").split("\n");
    return lines[name] === undefined
      ? part
      : `${[name, ...lines[name](text.join("\n"))].join("\n")}\n`;
  });
  return parts.join(`\n${nonce} `);
}

/** All subvolumes of a folder's filesystem, without giving way to anything else meanwhile. Errors: Refused. */
function listedNow(folder: string): Subvolume[] {
  const list = (...options: string[]) => {
    const { status, stdout, stderr } = spawnSync(
      "btrfs",
      ["subvolume", "list", "-a", ...options, folder],
      {
        encoding: "utf8",
        maxBuffer: 2 ** 30,
        env: { PATH: `${process.env["PATH"] ?? ""}:/usr/sbin:/sbin`, LC_ALL: "C" },
      },
    );
    return status === 0
      ? stdout.replace(/\n$/, "")
      : refuse(`the subvolumes cannot be listed: ${stderr}`);
  };
  return parseSubvolumes(list("-c", "-u", "-q", "-R"), list("-r"));
}

/** Whether a stream may begin that subvolume, in a folder as it is now. Errors: Refused. */
function mayBegin(
  folder: Folder,
  announced: string | undefined,
  name: string,
  uuid: string,
  parent: string | null,
): void {
  if (
    parseName(name, folder.prefix) === null ||
    (announced !== undefined && name !== announced) ||
    folder.entries.has(name)
  )
    refuse(`the subvolume ${shown(name)}`);
  // Now, not when the session began; and of the whole filesystem, since receive looks for UUIDs in all of it, whatever its chroot. What is
  // received later by the same UUID comes behind: receive takes the first.
  const all = listedNow(folder.path);
  if (all.some((one) => `/${one.path}` === join(folder.top, name)))
    refuse(`the subvolume ${shown(name)}, which is there`);
  const having = (wanted: string) =>
    all.filter((one) => one.uuid === wanted || one.receivedUuid === wanted);
  if (having(uuid).length > 0) refuse(`the UUID ${uuid}, which is not new`);
  if (parent === null) return;
  const [first, ...others] = having(parent);
  const inFolder =
    first?.receivedUuid === parent && first.readonly && dirname(`/${first.path}`) === folder.top;
  if (others.length > 0 || !inFolder)
    refuse(`the parent ${parent}, which is not in the folder, or not alone`);
}

/** Reads along a stream that is received. What is refused never gets to its end there. */
async function receiveServed(given: ArgumentsOf<typeof RECEIVE>, said: Guarded): Promise<number> {
  const { folder: path, prefix, header, beginning, rest, part } = given;
  const folder = await lookedAt(said, "folder");
  const announced = header === "" ? null : guardedRecord(beginning + rest, folder, false);
  if (announced !== null && announced.receiving === undefined)
    refuse("a transfer without an announcement");
  if (announced !== null) notFromHere(announced, folder, said);
  if (announced === null && said.o.maxBytes !== null)
    refuse("a transfer without an announcement, which --max-bytes could not count");
  const { receiving: name, since: _, ...settled } = announced ?? {};
  const record =
    announced === null
      ? { header: "", key: "", beginning: "", rest: "" }
      : {
          header: RECORD_HEADER,
          key: recordKey(prefix),
          beginning: announcement(name as string, folder),
          rest: JSON.stringify(settled).slice(1),
        };
  if (part !== undefined && !PART.test(`${part}.part`)) refuse(`the file ${shown(part)}`);
  const kept = part === undefined ? null : join(path, `.${part}.part`);
  const file = kept === null ? null : openedPlain(kept);
  let made = "";
  return withinBytes(
    said.o,
    () => (file === null ? 0 : fstatSync(file).size),
    (left) => {
      const coming = { stream: true, level: given.level, file, left, most: said.o.maxBytes };
      return letIn(RECEIVE, { ...given, flag: `${given.flag}C`, level: "", ...record }, coming, {
        async begins(...begun) {
          mayBegin(folder, name, ...begun);
          made = begun[1];
        },
        whole: (bytes) =>
          said.o.maxBytes === null ? Promise.resolve() : rememberBytes(said, made, bytes),
      });
    },
  );
}

/** What comes with a guarded key: a send stream or any bytes, zstd's or as they are (`level`), on standard input or from a file; `left`: how many there is room for, of so many at most. */
type Coming = {
  readonly stream: boolean;
  readonly level: string;
  readonly file: number | null;
  readonly left: number;
  readonly most: number | null;
};

/** What is looked at before a stream that comes may begin, and done before its end is passed on. Errors: Refused. */
type Allowing = {
  readonly begins: (...begun: readonly [string, string, string | null]) => Promise<void>;
  readonly whole: (bytes: number) => Promise<void>;
};

/**
 * Runs a verb that takes what comes with a key, which the relay reads first. Where that is refused, the verb is killed before its input
 * closes. Returns the exit status. Errors: Refused.
 */
async function letIn<V extends Declared>(
  verb: V,
  given: ArgumentsOf<V>,
  { stream, level, file, left, most }: Coming,
  allowing: Allowing,
): Promise<number> {
  const state = join(mkdtempSync(join(runtimeDirectory(), "g")), "state");
  const relay: Relay = {
    guarded: { stream, most: left === Infinity ? null : left, refusal: noRoom(most), state },
  };
  const unpacked =
    level === "" ? "" : `{ zstd -q -d -c 3>&- 4>&-; echo "{\\"unpacked\\":$?}" >&3; } |`;
  const passed = `{ ${[...OURSELVES, RELAY, JSON.stringify(relay)].map(quote).join(" ")} || kill -KILL 0; } |`;
  const text = `${unpacked} ${passed} { exec 3>&- 4>&-; ${commandWith({ ...LOCAL, fence: "own" }, verb, given)}; }`;
  const child = spawn("sh", ["-c", text], {
    detached: true,
    env: { PATH: process.env["PATH"] ?? "" },
    stdio: [file ?? "inherit", "inherit", "pipe", "pipe", "pipe"],
  });
  const group = child.pid as number;
  running.add(() => sendSignal(-group, "SIGKILL"));
  const closed = new Promise<number | null>((done) => child.on("close", done));
  // A client may be silent as long as it lives, which the verb looks at itself: it may have a large tree to walk.
  let silent = 0;
  const worked = async () =>
    `${readIfThere(state) === "r" ? ++silent : silent} ${await workOf(LOCAL, { group })}`;
  const ended = attended(closed, verb.name, worked, () => sendSignal(-group, "SIGKILL"));
  ended.catch(() => {}); // told at the end
  child.stderr?.on("data", (chunk: Buffer) =>
    process.stderr.write(visible(chunk.toString().replace(/^Chroot to .*\n/m, ""))),
  );
  const [questions, answers] = child.stdio.slice(3) as unknown as [
    NodeJS.ReadableStream,
    NodeJS.WritableStream,
  ];
  answers.on("error", () => {}); // the relay has ended: its exit status tells
  let refused: Refused | null = null;
  try {
    for await (const line of createInterface(questions)) {
      const what = JSON.parse(line) as Said;
      if ("refused" in what) refuse(what.refused);
      if ("unpacked" in what && what.unpacked !== 0) refuse("zstd cannot read the stream");
      if ("begins" in what) await allowing.begins(...what.begins);
      if ("whole" in what) await allowing.whole(what.whole);
      if (!("unpacked" in what)) answers.write("\n");
      if ("whole" in what) break;
    }
  } catch (error) {
    refused = refusalOf(error);
  }
  answers.end();
  const status = await ended;
  if (refused !== null) throw refused;
  return status ?? 1;
}

// ── what is checked of a stream ──

// The relay checks streams before the rest of this file is loaded: what follows are functions, and what they need is in them.

/**
 * The commands of a send stream by their numbers, each with its name, the attributes that it must have and those that it may have (as
 * bits), and its kind: linux/fs/btrfs/send.h, and what send.c puts into each.
 */
function streamCommands() {
  const attribute = {
    uuid: 1,
    ctransid: 2,
    ino: 3,
    size: 4,
    mode: 5,
    uid: 6,
    gid: 7,
    rdev: 8,
    ctime: 9,
    mtime: 10,
    atime: 11,
    otime: 12,
    xattrName: 13,
    xattrData: 14,
    path: 15,
    pathTo: 16,
    pathLink: 17,
    offset: 18,
    data: 19,
    cloneUuid: 20,
    cloneCtransid: 21,
    clonePath: 22,
    cloneOffset: 23,
    cloneLength: 24,
    fallocateMode: 25,
    flags: 26,
    unencodedFileLength: 27,
    unencodedLength: 28,
    unencodedOffset: 29,
    compression: 30,
    encryption: 31,
  } as const;
  type AttributeName = keyof typeof attribute;
  type Kind =
    | "begin"
    | "end"
    | "file"
    | "make"
    | "node"
    | "symlink"
    | "rename"
    | "link"
    | "remove"
    | "change"
    | "clone"
    | "encoded"
    | "own";
  const bits = (names: readonly AttributeName[]) =>
    names.reduce((sum, one) => sum | (1 << attribute[one]), 0);
  const one = (
    name: string,
    kind: Kind,
    needs: readonly AttributeName[],
    may: readonly AttributeName[] = [],
  ) => ({ name, kind, needs: bits(needs), may: bits([...needs, ...may]) });
  const commands: Readonly<Record<number, ReturnType<typeof one>>> = {
    1: one("subvol", "begin", ["path", "uuid", "ctransid"]),
    2: one("snapshot", "begin", ["path", "uuid", "ctransid", "cloneUuid", "cloneCtransid"]),
    3: one("mkfile", "file", ["path"], ["ino"]),
    4: one("mkdir", "make", ["path"], ["ino"]),
    5: one("mknod", "node", ["path", "rdev", "mode"], ["ino"]),
    6: one("mkfifo", "make", ["path"], ["ino", "rdev", "mode"]),
    7: one("mksock", "make", ["path"], ["ino", "rdev", "mode"]),
    8: one("symlink", "symlink", ["path", "pathLink"], ["ino"]),
    9: one("rename", "rename", ["path", "pathTo"]),
    10: one("link", "link", ["path", "pathLink"]),
    11: one("unlink", "remove", ["path"]),
    12: one("rmdir", "remove", ["path"]),
    // These do not follow a link that has the last name of their path; those of the kinds "change" and "file" (creat(2)) do.
    13: one("set_xattr", "own", ["path", "xattrName", "xattrData"]),
    14: one("remove_xattr", "own", ["path", "xattrName"]),
    15: one("write", "change", ["path", "offset", "data"]),
    16: one("clone", "clone", [
      "path",
      "offset",
      "cloneLength",
      "cloneUuid",
      "cloneCtransid",
      "clonePath",
      "cloneOffset",
    ]),
    17: one("truncate", "change", ["path", "size"]),
    18: one("chmod", "change", ["path", "mode"]),
    19: one("chown", "own", ["path", "uid", "gid"]),
    20: one("utimes", "own", ["path", "atime", "mtime", "ctime"], ["otime"]),
    21: one("end", "end", []),
    24: one("fileattr", "change", ["path", "flags"]),
    25: one(
      "encoded_write",
      "encoded",
      ["path", "offset", "unencodedFileLength", "unencodedLength", "unencodedOffset", "data"],
      ["compression", "encryption"],
    ),
  };
  return { attribute, commands };
}

/** Errors: Refused. */
function refuse(why: string): never {
  throw new Refused(why);
}

/** A check that is under way: `pass` tells how far of `bytes`, from `at` to `end`, may go on; `finish`: nothing more comes, and what was held back may go. Errors of both: Refused. */
type Checking = {
  readonly pass: (bytes: Buffer, at: number, end: number) => number;
  readonly finish: () => void;
};

/**
 * Reads along a send stream, and refuses what `btrfs send` would not send, and what could reach out of the one subvolume that it makes.
 * What its paths lead to is not looked at: behind the fence the kernel follows no links and opens no devices. Where there is no fence
 * (`alone`), devices are refused, and paths through links that the stream made. `begins` gets that subvolume's name, its UUID, and its
 * parent's (null in full). The end is held back until nothing follows.
 */
export function streamCheck(
  begins: (name: string, uuid: string, parent: string | null) => void,
  alone = false,
): Checking {
  const HEADER = 10; // bytes: length, command, CRC
  const MAGIC = "btrfs-stream\0";
  /** The longest command in bytes, by protocol: 64 KiB, and for protocol 2 what encoded data of 128 KiB need at any page size. */
  const LONGEST = [0, 64 * 1024, 256 * 1024];
  const { attribute, commands } = streamCommands();
  // Where each attribute of the command begins and ends that is being looked at.
  const [from, to] = [new Int32Array(32), new Int32Array(32)];
  const links = alone ? madeLinks() : null;
  let protocol = 0;
  /** How long the end is that is held back; 0 before. */
  let held = 0;
  /** What may be cloned from: itself, and its parent. */
  let sources: readonly Buffer[] | null = null;

  /** Reads the attributes of a command. */
  function readAttributes(name: string, bytes: Buffer, begin: number, end: number): number {
    let seen = 0;
    for (let at = begin; at < end;) {
      const type = at + 2 <= end ? bytes.readUInt16LE(at) : 0;
      // In protocol 2, data have no length of their own: they are the rest of the command.
      const isRest = protocol === 2 && type === attribute.data;
      const first = at + (isRest ? 2 : 4);
      const last = isRest ? end : first <= end ? first + bytes.readUInt16LE(at + 2) : Infinity;
      if (type < 1 || type > 31 || last > end || (seen & (1 << type)) !== 0)
        refuse(`${name}: an attribute that is unknown, cut short, or there twice`);
      seen |= 1 << type;
      from[type] = first;
      to[type] = last;
      at = last;
    }
    return seen;
  }
  const value = (bytes: Buffer, type: number) => bytes.subarray(from[type], to[type]);
  const number = (bytes: Buffer, type: number) => streamNumber(value(bytes, type));

  /** Checks that an attribute is a path below the subvolume; `itself`: or that. */
  function checkPath(name: string, bytes: Buffer, type: number, itself: boolean): void {
    const [begin, end] = [from[type] as number, to[type] as number];
    let part = begin;
    let isFine = end - begin <= 4096 && (itself || end > begin);
    for (let at = begin; at <= end && end > begin; at++) {
      const byte = at === end ? 0x2f : bytes[at];
      if (byte === 0) isFine = false;
      if (byte !== 0x2f) continue;
      const length = at - part;
      if (
        length === 0 ||
        (bytes[part] === 0x2e && (length === 1 || (length === 2 && bytes[part + 1] === 0x2e)))
      )
        isFine = false;
      part = at + 1;
    }
    if (!isFine)
      refuse(
        `${name}: the path ${JSON.stringify(bytes.toString("latin1", begin, Math.min(end, begin + 200)))}`,
      );
  }
  const pathOf = (bytes: Buffer, type: number) => bytes.toString("latin1", from[type], to[type]);

  function checkBegin(bytes: Buffer, isFull: boolean): void {
    if (sources !== null) refuse("a second subvolume");
    const [uuid, parent] = [
      Buffer.from(value(bytes, attribute.uuid)),
      isFull ? null : Buffer.from(value(bytes, attribute.cloneUuid)),
    ];
    const path = value(bytes, attribute.path);
    const name = path.toString();
    if (!Buffer.from(name).equals(path) || name.includes("\ufffd"))
      refuse(`the name ${JSON.stringify(name.slice(0, 100))}, which is not UTF-8`);
    if (uuid.every((byte) => byte === 0)) refuse("a subvolume without a UUID");
    begins(name, streamUuid(uuid), parent && streamUuid(parent));
    sources = parent === null ? [uuid] : [uuid, parent];
  }

  /** What the kernel does not take as it is, receive unpacks itself, and trusts the lengths; LZO it cannot unpack safely at all. */
  function checkEncoded(name: string, bytes: Buffer, seen: number): void {
    const given = (type: number) => ((seen & (1 << type)) === 0 ? 0n : number(bytes, type));
    const [length, file, offset] = [
      number(bytes, attribute.unencodedLength),
      number(bytes, attribute.unencodedFileLength),
      number(bytes, attribute.unencodedOffset),
    ];
    // What is no multiple of a block the kernel does not take as it is.
    if (number(bytes, attribute.offset) % 4096n !== 0n)
      refuse(`${name}: at ${number(bytes, attribute.offset)}`);
    const [compression, encryption] = [given(attribute.compression), given(attribute.encryption)];
    if (
      length < 1n ||
      length > 131072n ||
      offset + file > length ||
      encryption !== 0n ||
      compression < 1n ||
      compression > 2n
    )
      refuse(`${name}: compression ${compression} of ${length} bytes (--protocol 1 sends without)`);
  }

  /** Checks a command beyond its attributes' being there. */
  function checkCommand(
    { name, kind }: (typeof commands)[number],
    bytes: Buffer,
    seen: number,
  ): void {
    const { path, pathTo, pathLink, clonePath, cloneUuid } = attribute;
    const makes =
      kind !== "change" &&
      kind !== "own" &&
      kind !== "clone" &&
      kind !== "encoded" &&
      kind !== "begin";
    checkPath(name, bytes, path, !makes);
    if (kind === "begin") return checkBegin(bytes, name === "subvol");
    const known = sources ?? refuse("it does not begin with a subvolume");
    if (kind === "rename") checkPath(name, bytes, pathTo, false);
    if (kind === "link") checkPath(name, bytes, pathLink, true);
    if (kind === "clone") {
      if (!known.some((one) => one.equals(value(bytes, cloneUuid))))
        refuse("clone: from another subvolume");
      checkPath(name, bytes, clonePath, true);
    }
    if (kind === "encoded") checkEncoded(name, bytes, seen);
    if (links === null) return;
    if (
      kind === "node" &&
      [0o020000n, 0o060000n].includes(number(bytes, attribute.mode) & 0o170000n)
    )
      refuse(`${name}: a device, and no fence`);
    links.walk(
      name,
      pathOf(bytes, path),
      kind === "file" || kind === "change" || kind === "clone" || kind === "encoded",
    );
    if (kind === "clone") links.walk(name, pathOf(bytes, clonePath), true);
    if (kind === "rename") links.walk(name, pathOf(bytes, pathTo), false);
    if (kind === "link") links.walk(name, pathOf(bytes, pathLink), false);
    if (kind === "symlink") links.make(pathOf(bytes, path));
    if (kind === "link") links.alias(pathOf(bytes, pathLink), pathOf(bytes, path));
    if (kind === "rename") links.move(pathOf(bytes, path), pathOf(bytes, pathTo));
    if (kind === "remove") links.remove(pathOf(bytes, path));
  }

  function pass(bytes: Buffer, at: number, end: number): number {
    if (protocol === 0) {
      const known = bytes.toString("latin1", at, Math.min(end, at + MAGIC.length));
      if (!MAGIC.startsWith(known)) refuse("this is no send stream");
      if (end - at < MAGIC.length + 4) return at;
      protocol = bytes.readUInt32LE(at + MAGIC.length);
      if (protocol !== 1 && protocol !== 2) refuse(`a stream of protocol ${protocol}`);
      at += MAGIC.length + 4;
    }
    while (held === 0 && end - at >= HEADER) {
      const length = bytes.readUInt32LE(at) + HEADER;
      if (length > (LONGEST[protocol] as number)) refuse(`a command of ${length} bytes`);
      if (end - at < length) break;
      const code = bytes.readUInt16LE(at + 4);
      const command = commands[code] ?? refuse(`the unknown command ${code}`);
      const seen = readAttributes(command.name, bytes, at + HEADER, at + length);
      if ((seen & command.needs) !== command.needs || (seen & ~command.may) !== 0)
        refuse(`${command.name}: other attributes than it has`);
      if (command.kind === "end") {
        if (sources === null) refuse("it does not begin with a subvolume");
        held = length;
      } else {
        checkCommand(command, bytes, seen);
        at += length;
      }
    }
    if (held > 0 && end - at > held) refuse("something follows the stream's end");
    return at;
  }
  const finish = () => void (held > 0 || refuse("the stream is not complete"));
  return { pass, finish };
}

/** The links that a stream has made, by their paths in latin1, which nothing may go through. Errors: Refused. */
function madeLinks() {
  const MOST = 64 * 2 ** 20; // bytes of their paths
  const paths = new Set<string>();
  /** How many there are below each directory. */
  const below = new Map<string, number>();
  let bytes = 0;
  const count = (path: string, by: 1 | -1) => {
    bytes += by * path.length;
    for (let at = path.lastIndexOf("/"); at !== -1; at = path.lastIndexOf("/", at - 1)) {
      const directory = path.slice(0, at);
      const left = (below.get(directory) ?? 0) + by;
      if (left === 0) below.delete(directory);
      else below.set(directory, left);
    }
  };
  const make = (path: string) => {
    if (paths.size === paths.add(path).size) return;
    count(path, 1);
    if (bytes > MOST) refuse("more links than can be remembered, and no fence");
  };
  const remove = (path: string) => {
    if (paths.delete(path)) count(path, -1);
  };
  return {
    make,
    remove,
    alias: (there: string, path: string) => void (paths.has(there) && make(path)),
    /** Whether a path goes through a link, or is one and is followed. */
    walk(name: string, path: string, follows: boolean) {
      if (paths.size === 0) return;
      for (let at = path.indexOf("/"); at !== -1; at = path.indexOf("/", at + 1))
        if (paths.has(path.slice(0, at)))
          refuse(`${name}: through the link ${JSON.stringify(path.slice(0, at))}, and no fence`);
      if (follows && paths.has(path))
        refuse(`${name}: through the link ${JSON.stringify(path)}, and no fence`);
    },
    move(path: string, to: string) {
      // rename(2) does nothing where both are names of one link: then both stay.
      if (paths.has(path) && paths.has(to)) return;
      remove(to);
      const moving = paths.has(path)
        ? [path]
        : below.has(path)
          ? [...paths].filter((one) => one.startsWith(`${path}/`))
          : [];
      for (const one of moving) remove(one);
      for (const one of moving) make(to + one.slice(path.length));
    },
  };
}

/** Refuses a stream that begins otherwise than was expected. */
function expecting({ name, uuid, parent }: Expected): Parameters<typeof streamCheck>[0] {
  return (said, ...uuids) => {
    if (said !== name)
      refuse(
        `a stream of ${JSON.stringify(said.slice(0, 100))} instead of ${JSON.stringify(name)}`,
      );
    if (uuid === "") return;
    if (uuids[0] !== uuid || uuids[1] !== parent)
      refuse(`a stream of other data than ${name} has, or to another parent than it was asked for`);
  };
}

function streamNumber(bytes: Buffer): bigint {
  return bytes.length === 8
    ? bytes.readBigUInt64LE()
    : bytes.length === 4
      ? BigInt(bytes.readUInt32LE())
      : refuse("a number of another length");
}

function streamUuid(bytes: Buffer): string {
  return bytes.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

// ── 9. Command line ──────────────────────────────────────────────────────────────────────

const HOST_ARGUMENTS = {
  "ssh-opt": {
    type: "string",
    valueHint: "OPTION",
    description: "Passed to ssh as -o OPTION (repeatable)",
  },
  "ssh-sudo": { type: "boolean", description: "Run btrfs under sudo -n on other hosts" },
  sudo: { type: "boolean", description: "Run btrfs under sudo -n here" },
  "snapshot-folder": {
    type: "string",
    alias: "f",
    valueHint: "DIR",
    description: "Snapshot folder, relative to SOURCE or absolute (default: snapshot)",
  },
  "snapshot-prefix": {
    type: "string",
    alias: "p",
    valueHint: "PREFIX",
    description: "What snapshot names begin with (default: nothing)",
  },
  timeout: {
    type: "string",
    valueHint: "SECONDS",
    description:
      "Give up what has done nothing for so long: no byte moved, and no process of it worked (default: 3600; 0 is never)",
  },
  verbosity: {
    type: "string",
    alias: "v",
    valueHint: "LEVEL",
    description: "debug, info, warning or error (default: info)",
  },
  quiet: { type: "boolean", alias: "q", description: "Same as --no-progress --verbosity warning" },
  json: {
    type: "boolean",
    description: "Tell what happens on standard output, one JSON object a line",
  },
  help: { type: "boolean", alias: "h", description: "Show this text" },
} as const satisfies ArgsDef;

const WAIT = {
  wait: {
    type: "string",
    valueHint: "SECONDS",
    description: "Wait for a lock that another run holds (default: do not wait)",
  },
} as const satisfies ArgsDef;

const RUN_ARGUMENTS = {
  "num-snapshots": {
    type: "string",
    alias: "N",
    valueHint: "POLICY",
    description:
      "What to keep at the source: a number, or words like '24h 7d 4w 12m 14d+' (default: 0, everything)",
  },
  "num-backups": {
    type: "string",
    alias: "n",
    valueHint: "POLICY",
    description: "What to keep at each destination (default: 0, everything)",
  },
  "latest-only": { type: "boolean", description: "Deprecated: same as --num-snapshots 1" },
  "no-snapshot": {
    type: "boolean",
    alias: "S",
    description: "Take no snapshot, transfer existing ones",
  },
  "no-transfer": { type: "boolean", alias: "T", description: "Transfer nothing" },
  "no-incremental": { type: "boolean", alias: "I", description: "Always send in full" },
  "no-full": {
    type: "boolean",
    description:
      "Fail rather than send in full to a destination that has nothing of SOURCE, or nothing that a difference can be made against",
  },
  "newest-only": {
    type: "boolean",
    description: "Send only the newest snapshot, not what was missed before",
  },
  backfill: {
    type: "boolean",
    description:
      "Without -n: send also what is older than the newest snapshot that a destination has",
  },
  optional: {
    type: "string",
    valueHint: "DEST",
    description: "A destination that may be absent (repeatable)",
  },
  "max-age": {
    type: "string",
    valueHint: "DURATION",
    description: "Fail when an absent --optional destination was last served longer ago, e.g. 3d",
  },
  "keep-unsent": {
    type: "boolean",
    description: "Keep what a destination could not get yet also for those that are --optional",
  },
  "drop-unsent": {
    type: "boolean",
    description:
      "Keep nothing at the source for the sake of a destination that could not get it, but what both share",
  },
  "make-room": {
    type: "boolean",
    description: "When a destination is full, delete first what -n would delete afterwards",
  },
  "before-snapshot": {
    type: "string",
    valueHint: "CMD",
    description: "Run on SOURCE's host before the snapshot, which is not taken if it fails",
  },
  "after-snapshot": {
    type: "string",
    valueHint: "CMD",
    description: "Run on SOURCE's host after the snapshot, always",
  },
  adopt: {
    type: "boolean",
    description: "Take over a destination that belonged to another source, or a replaced disk",
  },
  "adopt-clock": {
    type: "boolean",
    description: "Delete what is too old although the clock seems to have leapt: it is right",
  },
  "dry-run": { type: "boolean", description: "Say what would happen and why; change nothing" },
  sync: {
    type: "boolean",
    alias: "s",
    description: "Wait until deleted subvolumes are gone (btrfs subvolume sync)",
  },
  "convert-rw": {
    type: "boolean",
    alias: "w",
    description: "Make snapshots writable before deleting them (for user_subvol_rm_allowed)",
  },
  "locked-dests": { type: "boolean", description: "Add every known destination of SOURCE" },
  "remove-locks": {
    type: "boolean",
    description: "Forget the given destinations first (see unpin)",
  },
  "skip-fs-checks": {
    type: "boolean",
    alias: "C",
    description: "Do not check that SOURCE and DEST are on btrfs, and not on the same one",
  },
  "skip-space-check": {
    type: "boolean",
    description: "Send also what a destination seems to lack the space for",
  },
  "trust-stream": {
    type: "boolean",
    description:
      "Receive what another host or a store made as it is: nobody reads along whether it keeps to its subvolume",
  },
  for: {
    type: "string",
    valueHint: "DEST",
    description:
      "A destination with -n, --full-every, --compress, --encrypt-to and --rate-limit of its own, which follow (repeatable)",
  },
  "full-every": {
    type: "string",
    valueHint: "N|DURATION",
    description:
      "Stored streams: begin a new chain with a full one after N, or after a time like 30d; 0 is never (default: 30)",
  },
  compress: {
    type: "string",
    valueHint: "zstd[:LEVEL]",
    description: "Compress what travels between hosts, is stored as a stream, or goes to a command",
  },
  "encrypt-to": {
    type: "string",
    valueHint: "RECIPIENT",
    description:
      "Encrypt streams that are stored or go to a command with gpg's public key of RECIPIENT (repeatable)",
  },
  protocol: {
    type: "string",
    valueHint: "1|2",
    description:
      "Version of the send stream (default: 2, with data as they are compressed on the disk, where both sides know it; 1 for what is stored)",
  },
  resume: {
    type: "boolean",
    description:
      "Over ssh: go on where a transfer broke. The stream is kept as a file over there until it is whole",
  },
  jobs: {
    type: "string",
    valueHint: "N",
    description:
      "Send at most N streams at a time; destinations that need the same stream get it together (default: all)",
  },
  retries: {
    type: "string",
    valueHint: "N",
    description: "Try again up to N times in this run when a connection is lost (default: 0)",
  },
  "rate-limit": {
    type: "string",
    valueHint: "RATE",
    description: "Send at most so many bytes a second, with k, m or g for powers of 1024",
  },
  "btrfs-debug": {
    type: "boolean",
    alias: "d",
    description: "Let btrfs send and receive tell everything (-vv)",
  },
  "no-progress": { type: "boolean", alias: "P", description: "Show no progress" },
  metrics: {
    type: "string",
    valueHint: "FILE",
    description: "Write metrics for Prometheus' node exporter (textfile collector)",
  },
  ...WAIT,
  ...HOST_ARGUMENTS,
  version: { type: "boolean", description: "Show the version" },
} as const satisfies ArgsDef;

/** Some of the options of `run`, meaning the same. */
const ofRun = <K extends keyof typeof RUN_ARGUMENTS>(...names: readonly K[]) =>
  Object.fromEntries(names.map((name) => [name, RUN_ARGUMENTS[name]])) as unknown as Pick<
    typeof RUN_ARGUMENTS,
    K
  >;

const positional = (description: string, required = true) =>
  ({ type: "positional", description, required }) as const;
const PLACE = "/path or ssh://[user@]host[:port]/path";
const STORE = "raw:///path, raw+ssh://[user@]host[:port]/path or rclone://REMOTE:PATH";

const REPEATABLE = new Set(["path", "ssh-opt", "optional", "encrypt-to", "for"]);
/** Behind --for DEST, they count for DEST only. */
const SCOPED = new Set(["num-backups", "full-every", "compress", "encrypt-to", "rate-limit"]);

/** What was given: the last of each option, all of a repeatable one. */
type Options = {
  readonly flag: (name: string) => boolean;
  readonly value: (name: string) => string | null;
  readonly all: (name: string) => string[];
};
/** `scopes`: for each --for DEST what holds there. */
type Given = Options & {
  readonly positionals: readonly string[];
  readonly scopes: readonly { readonly value: string; readonly given: Options }[];
};

/** The long options of 0.2 to 0.3.1, which took any beginning that only one of them has. */
const OLD_OPTIONS = [
  "verbosity",
  "quiet",
  "btrfs-debug",
  "no-progress",
  "num-snapshots",
  "num-backups",
  "latest-only",
  "no-snapshot",
  "snapshot-folder",
  "snapshot-prefix",
  "no-transfer",
  "no-incremental",
  "ssh-opt",
  "ssh-sudo",
  "sync",
  "convert-rw",
  "locked-dests",
  "remove-locks",
  "skip-fs-checks",
];

/** An argument with the whole name of the option, where it has only the beginning of an old one's. No value begins with two dashes. */
function inFull(arg: string, defined: readonly string[]): string {
  const [, name = "", rest = ""] = /^--([a-z][a-z-]*)(=.*)?$/s.exec(arg) ?? [];
  if (name === "" || defined.includes(name) || !OLD_OPTIONS.every((one) => defined.includes(one)))
    return arg;
  const meant = OLD_OPTIONS.filter((one) => one.startsWith(name));
  if (meant.length > 1)
    throw new UsageError(`--${name} can mean ${meant.map((one) => `--${one}`).join(" or ")}`);
  return meant.length === 1 ? `--${meant[0]}${rest}` : arg;
}

/** Reads arguments strictly. Errors: UsageError naming the nearest option. */
export function readArguments(args: readonly string[], definitions: ArgsDef): Given {
  const defined = Object.entries(
    definitions as Record<string, ArgDef & { alias?: string | string[] }>,
  ).filter(([, { type }]) => type !== "positional");
  // -n=3 is what argparse let pass; parseArgs would take the = for a part of the value.
  const spelled = args.map((arg) => {
    const [, letter, value] = /^-([A-Za-z])=(.*)$/s.exec(arg) ?? [];
    const name = defined.find(
      ([, { alias, type }]) => letter !== undefined && alias === letter && type === "string",
    )?.[0];
    return name === undefined
      ? inFull(
          arg,
          defined.map(([name]) => name),
        )
      : `--${name}=${value}`;
  });
  const options = Object.fromEntries(
    defined.map(([name, { type, alias }]) => [
      name,
      {
        type: type === "boolean" ? ("boolean" as const) : ("string" as const),
        multiple: REPEATABLE.has(name),
        ...(typeof alias === "string" ? { short: alias } : {}),
      },
    ]),
  );
  try {
    const { positionals, tokens } = parseArgs({
      args: spelled,
      options,
      strict: true,
      allowPositionals: true,
      tokens: true,
    });
    const everywhere: [name: string, value: string][] = [];
    const scopes: { value: string; words: typeof everywhere }[] = [];
    for (const token of tokens) {
      if (token.kind !== "option") continue;
      const { name, value = "" } = token;
      if (name === "for") scopes.push({ value, words: [] });
      else
        (SCOPED.has(name) ? (scopes.at(-1)?.words ?? everywhere) : everywhere).push([name, value]);
    }
    const given = (words: typeof everywhere): Options => {
      const all = (name: string) => words.filter(([one]) => one === name).map(([, value]) => value);
      return {
        flag: (name) => all(name).length > 0,
        value: (name) => all(name).at(-1) ?? null,
        all,
      };
    };
    const within = (words: typeof everywhere) =>
      given([...everywhere.filter(([name]) => !words.some(([own]) => own === name)), ...words]);
    return {
      ...given(everywhere),
      positionals,
      scopes: scopes.map(({ value, words }) => ({ value, given: within(words) })),
    };
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    const dashed = /^Option '(--?[\w-]+)' argument is ambiguous/.exec(message)?.[1];
    if (dashed !== undefined)
      throw new UsageError(
        `${dashed} has no value: what follows it begins with a dash, and would be another option`,
      );
    if (code !== "ERR_PARSE_ARGS_UNKNOWN_OPTION")
      throw new UsageError(message.replaceAll("\n", " "));
    const named = /'(-*)([^']*)'/.exec(message); // Bun leaves the dash of a short one out
    const unknown = `${named?.[1] || "-"}${named?.[2] ?? ""}`;
    const best = nearest(
      unknown,
      defined.map(([name]) => `--${name}`),
    );
    const meant = unknown.startsWith("--keep-")
      ? `; what is kept is said by -N (at the source) and -n (at destinations), as in -n "7d 4w 12m"`
      : unknown.startsWith("--") && best.far <= 3
        ? `; did you mean ${best.word}?`
        : "";
    throw new UsageError(`unknown option ${unknown}${meant}`);
  }
}

/** How many letters to add, drop or change to make one word of the other (Levenshtein). */
export function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++)
      next.push(
        Math.min(
          (row[j] as number) + 1,
          (next[j - 1] as number) + 1,
          (row[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1),
        ),
      );
    row = next;
  }
  return row[b.length] as number;
}

/**
 * Replaces each @FILE by the arguments in it: one flag, `--option value` or positional a line, as
 * 0.3.1 read them. Errors: UsageError for a file that cannot be read, or includes itself.
 */
export function expandFiles(
  args: readonly string[],
  read: (path: string) => string,
  including: readonly string[] = [],
): string[] {
  return args.flatMap((arg) => {
    if (!arg.startsWith("@")) return [arg];
    const named = arg.slice(1);
    const path = normalize(
      named.startsWith("/") ? named : join(dirname(including.at(-1) ?? "."), named),
    );
    if (including.includes(path))
      throw new UsageError(
        `argument files include each other: ${[...including, path].join(" -> ")}`,
      );
    let text: string;
    try {
      text = read(path);
    } catch (error) {
      throw new UsageError(`cannot read the argument file ${path}: ${(error as Error).message}`);
    }
    const lines = text.split(/\r\n|\r|\n/).map((line) => line.trim());
    const words = lines
      .filter((line) => line !== "" && !line.startsWith("#"))
      .flatMap((line) => /^(-\S*)\s+(.*)$/.exec(line)?.slice(1) ?? [line]);
    return expandFiles(words, read, [...including, path]);
  });
}

/** The value of an option that must be a whole number. */
function wholeNumber(text: string | null, option: string, otherwise: number, least = 0): number {
  if (text === null) return otherwise;
  if (!/^\d{1,9}$/.test(text) || Number(text) < least)
    throw new UsageError(
      `${option} takes a whole number${least > 0 ? ` from ${least}` : ""}, not "${text}"`,
    );
  return Number(text);
}

/** A location that has to be a folder with subvolumes. */
function folderLocation(text: string | undefined, what: string): Readable {
  if (text === undefined) throw new UsageError(`${what} is missing`);
  const location = parseLocation(text);
  if (location.kind !== "folder")
    throw new UsageError(
      `${what} cannot be ${location.kind === "shell" ? "a command" : "stored streams"}: ${text}`,
    );
  return location;
}

/** A location that something can be read from. */
function readableLocation(text: string): Readable {
  const location = parseLocation(text);
  if (location.kind === "shell")
    throw new UsageError(`nothing can be read from a command: ${text}`);
  return location;
}

/** How long what does nothing is waited for. */
function limitTime(given: Given): void {
  LIMITS.stuck = 1000 * wholeNumber(given.value("timeout"), "--timeout", 3600) || Infinity;
  LIMITS.parting = Math.min(10e3, LIMITS.stuck);
}

/** What every command understands. */
function commonOptions(given: Given) {
  const verbosity = given.flag("quiet") ? "warning" : (given.value("verbosity") ?? "info");
  if (!Object.hasOwn(LEVELS, verbosity))
    throw new UsageError(
      `--verbosity is one of ${Object.keys(LEVELS).join(", ")}, not "${verbosity}"`,
    );
  log.level = LEVELS[verbosity as keyof typeof LEVELS];
  const prefix = given.value("snapshot-prefix") ?? "";
  if (!isPrefix(prefix))
    throw new UsageError("a prefix is at most 200 bytes, without slashes and control characters");
  const snapshotFolder = (given.value("snapshot-folder") ?? "snapshot") || "."; // an empty one was SOURCE itself for 0.3.1
  if (snapshotFolder.trim() === "" || snapshotFolder.includes("\0"))
    throw new UsageError("--snapshot-folder cannot be empty");
  limitTime(given);
  const hosts: Hosts = {
    sshOptions: given.all("ssh-opt"),
    sudo: given.flag("sudo"),
    sshSudo: given.flag("ssh-sudo"),
  };
  return {
    prefix: given.value("snapshot-prefix"),
    snapshotFolder,
    hosts,
    wait: wholeNumber(given.value("wait"), "--wait", 0),
    json: given.flag("json"),
  };
}

const policyOf = (given: Options, option: string) => parsePolicy(given.value(option) ?? "0");

/** The value of --max-age. */
function ageOf(given: Given) {
  const text = given.value("max-age");
  return text === null ? null : { ...parseDuration(text), text };
}

/** Positionals that must be as many as a command takes. */
function locationsOf(given: Given, least: number, most: number, what: string): Readable[] {
  const { positionals } = given;
  if (positionals.length < least || positionals.length > most)
    throw new UsageError(
      `${positionals.length < least ? "missing" : "too many"} arguments: give ${what}`,
    );
  return positionals.map(readableLocation);
}

/** Reads the command line of `run`. */
export function runOptions(given: Given) {
  const [first, ...rest] = given.positionals;
  const source = folderLocation(first, "SOURCE");
  const sourcePolicy = given.flag("latest-only")
    ? parsePolicy("1")
    : policyOf(given, "num-snapshots");
  const common = commonOptions(given);
  const destinations = destinationsOf(given, rest, common.prefix ?? "");
  for (const [one, other] of [
    ["keep-unsent", "drop-unsent"],
    ["no-full", "no-incremental"],
    ["backfill", "newest-only"],
  ] as const)
    if (given.flag(one) && given.flag(other))
      throw new UsageError(`--${one} and --${other} contradict each other`);
  if (destinations.length === 0) sendingOptions(given, null); // nonsense is told all the same
  return {
    ...common,
    prefix: common.prefix ?? "",
    source,
    destinations,
    sourcePolicy,
    backupPolicy: policyOf(given, "num-backups"),
    snapshot: !given.flag("no-snapshot"),
    transfer: !given.flag("no-transfer"),
    incremental: !given.flag("no-incremental"),
    newestOnly: given.flag("newest-only"),
    full: !given.flag("no-full"),
    backfill: given.flag("backfill"),
    deletion: { convertRw: given.flag("convert-rw"), sync: given.flag("sync") },
    lockedDestinations: given.flag("locked-dests"),
    removeLocks: given.flag("remove-locks"),
    fsChecks: !given.flag("skip-fs-checks"),
    spaceCheck: !given.flag("skip-space-check"),
    adopt: given.flag("adopt"),
    adoptClock: given.flag("adopt-clock"),
    keepUnsent: given.flag("keep-unsent"),
    dropUnsent: given.flag("drop-unsent"),
    makeRoom: given.flag("make-room"),
    maxAge: ageOf(given),
    jobs: wholeNumber(given.value("jobs"), "--jobs", Infinity, 1),
    beforeSnapshot: given.value("before-snapshot"),
    afterSnapshot: given.value("after-snapshot"),
    metrics: given.value("metrics") === null ? null : resolve(given.value("metrics") as string),
    retries: wholeNumber(given.value("retries"), "--retries", 0),
    ...displayOptions(given),
    sendingTo: (id: string) => sendingOptions(given, parseLocation(id)),
  };
}

/** What is to be served, and how. Errors: UsageError for options that a destination cannot honour. */
function destinationsOf(given: Given, positionals: readonly string[], prefix: string): Wanted[] {
  const optional = given.all("optional");
  const own = new Map(
    given.scopes.map(({ value, given }): [string, Options] => [parseLocation(value).id, given]),
  );
  if (own.size < given.scopes.length) throw new UsageError("--for names a destination twice");
  const texts = [...positionals, ...optional, ...given.scopes.map(({ value }) => value)];
  const absent = new Set(optional.map((text) => parseLocation(text).id));
  const optionsOf = ({ id }: Location) => own.get(id) ?? given;
  const destinations = [
    ...new Map(texts.map(parseLocation).map((location) => [location.id, location])).values(),
  ].map((location): Wanted => {
    const options = optionsOf(location);
    return {
      location,
      optional: absent.has(location.id),
      policy: policyOf(options, "num-backups"),
      sending: sendingOptions(options, location),
    };
  });
  const stores = ({ location: { kind } }: Wanted) => kind === "raw" || kind === "rclone";
  for (const wanted of destinations) {
    if (stores(wanted) && Buffer.byteLength(prefix) > STREAM_PREFIX_BYTES)
      throw new UsageError(
        `a prefix is at most ${STREAM_PREFIX_BYTES} bytes for stored streams, whose names say much more`,
      );
  }
  // What is said for one destination, or for all, must have a meaning for one of those.
  for (const some of [
    ...destinations.filter(({ location }) => own.has(location.id)).map((wanted) => [wanted]),
    destinations.filter(({ location }) => !own.has(location.id)),
  ]) {
    if (
      some.length > 0 &&
      !some.some(stores) &&
      some.some(({ location }) => optionsOf(location).value("full-every") !== null)
    )
      throw new UsageError(
        "--full-every needs a destination of stored streams: raw://, raw+ssh:// or rclone://",
      );
  }
  return destinations;
}

/** Reads the command line of `prune`. */
function pruneOptions(given: Given) {
  const [location] = locationsOf(given, 1, 1, "LOCATION") as [Readable];
  const policy = policyOf(given, "num-backups");
  if (policy === null) throw new UsageError("what is to be kept? Give -n POLICY");
  return {
    ...commonOptions(given),
    location,
    policy,
    dryRun: given.flag("dry-run"),
    adoptClock: given.flag("adopt-clock"),
    deletion: { convertRw: given.flag("convert-rw"), sync: given.flag("sync") },
  };
}

/** Reads the command line of `restore`. */
export function restoreOptions(given: Given) {
  const [location] = locationsOf(given, 2, 2, "LOCATION and TARGET") as [Readable];
  const target = folderLocation(given.positionals[1], "TARGET");
  const [snapshot, until] = [given.value("snapshot"), given.value("before")];
  if (snapshot !== null && until !== null)
    throw new UsageError("--snapshot and --before exclude each other");
  const words = [
    "snapshot-prefix",
    "snapshot-folder",
    "ssh-opt",
    "snapshot",
    "before",
    "compress",
    "rate-limit",
  ].flatMap((name) => given.all(name).map((value) => `--${name}=${value}`));
  for (const name of ["sudo", "ssh-sudo", "unverified"])
    if (given.flag(name)) words.push(`--${name}`);
  return {
    ...commonOptions(given),
    words: [...words, location.id],
    location,
    target,
    snapshot,
    before: until === null ? null : parseWhen(until),
    parentFrom: given.value("parent-from"),
    replace: given.flag("replace"),
    unverified: given.flag("unverified"),
    ...displayOptions(given),
    sending: sendingOptions(given, null),
  };
}

const displayOptions = (given: Given) => ({
  dryRun: given.flag("dry-run"),
  progress: !given.flag("no-progress") && !given.flag("quiet"),
  btrfsDebug: given.flag("btrfs-debug"),
});

/** How to send, to a destination if there is one. Errors: UsageError for what it cannot take. */
function sendingOptions(given: Options, location: Location | null): Sending {
  const [rate, compression, every, protocol] = [
    "rate-limit",
    "compress",
    "full-every",
    "protocol",
  ].map(given.value);
  if (protocol && !/^[12]$/.test(protocol))
    throw new UsageError(`--protocol is 1 or 2, not "${protocol}"`);
  const recipients = given.all("encrypt-to");
  const resume = given.flag("resume");
  if (resume && recipients.length > 0)
    throw new UsageError(
      "--resume and --encrypt-to exclude each other: gpg's output is another one each time",
    );
  if (location?.kind === "folder" && recipients.length > 0)
    throw new UsageError(
      `--encrypt-to: what is received on btrfs cannot be encrypted: ${location.id}. For another destination only: --for DEST --encrypt-to …`,
    );
  const chained = location?.kind === "raw" || location?.kind === "rclone";
  return {
    rate: rate ? parseRate(rate) : null,
    level: compression ? parseCompression(compression) : "",
    recipients,
    fullEvery: parseFullEvery(every ?? (chained ? FULL_EVERY : "0")),
    protocol: protocol ?? null,
    resume,
    spaceCheck: !given.flag("skip-space-check"),
    trust: given.flag("trust-stream"),
  };
}

/** How many streams a stored chain has by default, so that retention can free space. */
const FULL_EVERY = "30";

/** Reads the command line of `list`. */
export function listOptions(given: Given) {
  return {
    ...commonOptions(given),
    locations: locationsOf(given, 1, Infinity, "LOCATION…"),
    sourcePolicy: policyOf(given, "num-snapshots"),
    backupPolicy: policyOf(given, "num-backups"),
    size: given.flag("size"),
    maxAge: ageOf(given),
  };
}

/** Reads the command line of `verify`. */
export function verifyOptions(given: Given) {
  const [snapshot, all] = [given.value("snapshot"), given.flag("all")];
  if (snapshot !== null && all) throw new UsageError("--snapshot and --all exclude each other");
  const locations = locationsOf(
    given,
    1,
    Infinity,
    "SOURCE and LOCATION…, two LOCATIONs, or one of stored streams",
  );
  if (locations.filter(({ kind }) => kind === "folder").length === 1)
    throw new UsageError(
      `with what shall ${locations[0]?.id} be compared? Give SOURCE and LOCATION…, two LOCATIONs, or one of stored streams`,
    );
  return { ...commonOptions(given), locations, snapshot, all };
}

/** Reads the command line of `versions`. */
export function versionsOptions(given: Given) {
  const [, ...locations] = locationsOf(given, 1, Infinity, "FILE [LOCATION…]");
  const file = folderLocation(given.positionals[0], "FILE");
  for (const { kind, id } of locations)
    if (kind !== "folder")
      throw new UsageError(`stored streams cannot be looked into, only restored: ${id}`);
  const [get, to] = [given.value("get"), given.value("to")];
  if (get === null && (to !== null || given.flag("force")))
    throw new UsageError("--to and --force need --get");
  if (to !== null && file.host !== null && !to.startsWith("/"))
    throw new UsageError("--to must be an absolute path, on FILE's host");
  return {
    ...commonOptions(given),
    file,
    locations,
    get,
    to: to !== null && file.host === null ? resolve(to) : to,
    force: given.flag("force"),
  };
}

/** Reads the command line of `guard`. */
function guardOptions(given: Given) {
  const paths = given.all("path");
  if (given.positionals.length > 0)
    throw new UsageError(`too many arguments: ${given.positionals[0]}`);
  if (paths.length === 0 || !paths.every((path) => path.startsWith("/")))
    throw new UsageError("--path DIR, an absolute path, says what the key is for");
  limitTime(given);
  return {
    paths: paths.map((path) => withoutSlash(normalize(path))),
    source: given.flag("source"),
    allowRead: given.flag("allow-read"),
    allowDelete: given.flag("allow-delete"),
    maxBytes:
      given.value("max-bytes") === null ? null : parseSize(given.value("max-bytes") as string),
  };
}

/** Reads the command line of `unpin`. */
function unpinOptions(given: Given): UnpinOptions {
  const [first, ...rest] = given.positionals;
  const all = given.flag("all");
  if (all === rest.length > 0)
    throw new UsageError("name the destinations to forget, or say --all");
  const common = commonOptions(given);
  return {
    ...common,
    prefix: common.prefix ?? "",
    source: folderLocation(first, "SOURCE"),
    locations: rest.map((text) => parseLocation(text).id),
    all,
  };
}

/** Reads the command line of `copy`. */
function copyOptions(given: Given) {
  if (given.positionals.length + given.all("optional").length + given.scopes.length < 2)
    throw new UsageError("missing arguments: give LOCATION and DEST…");
  return { ...runOptions(given), prefix: given.value("snapshot-prefix"), snapshot: false };
}

/** A command: how its arguments are read, and what it does then. */
const command = <O>(
  name: string,
  description: string,
  args: ArgsDef,
  read: (given: Given) => O,
  work: (options: O, report: Report) => Promise<void | number>,
): CommandDef<any> =>
  defineCommand({
    meta: { name: `btrfs-backup${name}`, version: VERSION, description },
    args,
    async run({ data }: { data?: Given }) {
      const given = data as Given;
      const options = read(given);
      return concluded(given, (report) => work(options, report));
    },
  });

export const COMMANDS: Record<string, CommandDef<any>> = {
  run: command(
    "",
    "Incremental backups of btrfs subvolumes. The command can be left out: it is run.",
    {
      source: positional(`Subvolume to back up: ${PLACE}`),
      dest: positional(
        `Where to: ${PLACE}; streams to ${STORE}, or shell://COMMAND; any number`,
        false,
      ),
      ...RUN_ARGUMENTS,
    },
    runOptions,
    run,
  ),
  restore: command(
    " restore",
    "Make a subvolume again from a backup, or from a snapshot.",
    {
      location: positional(
        `Backups, or a source with its snapshots: ${PLACE}; or streams: ${STORE}`,
      ),
      target: positional(`The subvolume to make: ${PLACE}`),
      snapshot: {
        type: "string",
        valueHint: "NAME",
        description: "Restore this one (default: the newest)",
      },
      before: {
        type: "string",
        valueHint: "TIME",
        description: "Restore the newest at or before 'YYYY-MM-DD[ HH:MM[:SS]]'",
      },
      unverified: {
        type: "boolean",
        description: "Restore stored streams without their checksum objects",
      },
      replace: {
        type: "boolean",
        description: "TARGET exists: keep it beside as TARGET.before-YYYYMMDD-HHMMSS",
      },
      "parent-from": {
        type: "string",
        valueHint: "DIR",
        description:
          "Where snapshots are that the transfer can build on (default: beside TARGET, and in its snapshot folder)",
      },
      ...ofRun(
        "dry-run",
        "compress",
        "protocol",
        "rate-limit",
        "trust-stream",
        "btrfs-debug",
        "no-progress",
        "wait",
      ),
      ...HOST_ARGUMENTS,
    },
    restoreOptions,
    restore,
  ),
  list: command(
    " list",
    "Show what there is of each snapshot, at a source and its destinations.",
    {
      location: positional(
        `A source (its known destinations are added), or backups: ${PLACE}; or streams: ${STORE}; any number`,
      ),
      ...ofRun("num-snapshots", "num-backups"),
      size: {
        type: "boolean",
        description: "Tell how large each is (btrfs filesystem du, which is slow)",
      },
      "max-age": {
        type: "string",
        valueHint: "DURATION",
        description:
          "Only check that the newest backup is not older, e.g. 26h: one line each, and exit status 1 if it is",
      },
      ...HOST_ARGUMENTS,
    },
    listOptions,
    list,
  ),
  verify: command(
    " verify",
    "Read every byte of what two places share, or of stored streams, and compare.",
    {
      source: positional(
        `Snapshots or backups: ${PLACE}; or streams, which are compared with their checksums: ${STORE}`,
      ),
      location: positional("What to compare with them; any number", false),
      snapshot: {
        type: "string",
        valueHint: "NAME",
        description: "Compare this one (default: the newest that both have)",
      },
      all: { type: "boolean", description: "Compare all that both have" },
      ...HOST_ARGUMENTS,
    },
    verifyOptions,
    verify,
  ),
  versions: command(
    " versions",
    "Show every version of a file, or copy one back.",
    {
      file: positional(`File or directory in a source, which may be deleted: ${PLACE}`),
      location: positional(
        "Where to look besides the source's snapshots (default: its known destinations)",
        false,
      ),
      get: {
        type: "string",
        valueHint: "WHEN|NAME",
        description:
          "Copy back what it was in a snapshot, or at a time like 'YYYY-MM-DD[ HH:MM[:SS]]'",
      },
      to: {
        type: "string",
        valueHint: "PATH",
        description: "Where to, on FILE's host (default: FILE.NAME)",
      },
      force: { type: "boolean", description: "Replace a file that is there" },
      ...HOST_ARGUMENTS,
    },
    versionsOptions,
    versions,
  ),
  copy: command(
    " copy",
    "Send backups on to other places, as run does from a source.",
    {
      location: positional(
        `Backups: ${PLACE}; all prefixes one after the other, unless -p is given`,
      ),
      dest: positional("Where to; any number"),
      ...ofRun(
        "num-backups",
        "newest-only",
        "backfill",
        "no-incremental",
        "no-full",
        "optional",
        "max-age",
        "make-room",
        "adopt",
        "adopt-clock",
        "dry-run",
        "sync",
        "convert-rw",
        "skip-fs-checks",
        "skip-space-check",
        "for",
        "full-every",
        "compress",
        "encrypt-to",
        "protocol",
        "resume",
        "retries",
        "jobs",
        "rate-limit",
        "trust-stream",
        "btrfs-debug",
        "no-progress",
        "wait",
      ),
      ...HOST_ARGUMENTS,
    },
    copyOptions,
    copy,
  ),
  prune: command(
    " prune",
    "Delete backups that a policy does not keep, by when they were received.",
    {
      location: positional(
        `Backups: ${PLACE}; or streams: ${STORE}; all prefixes one after the other, unless -p is given`,
      ),
      ...ofRun("num-backups", "dry-run", "adopt-clock", "sync", "convert-rw", "wait"),
      ...HOST_ARGUMENTS,
    },
    pruneOptions,
    prune,
  ),
  guard: command(
    " guard",
    "Serve an ssh key that may do no more than these options say, as the command of its line in authorized_keys.",
    {
      path: {
        type: "string",
        valueHint: "DIR",
        description: "Where the key may back up to, or with --source from (repeatable)",
      },
      "allow-read": { type: "boolean", description: "It may read: restore from there, and verify" },
      "max-bytes": {
        type: "string",
        valueHint: "SIZE",
        description:
          "How many bytes the streams of its backups may have in all, with k, m or g for powers of 1024; one is received after the other then",
      },
      "allow-delete": {
        type: "boolean",
        description: "It may delete backups (default: only what a broken transfer left)",
      },
      source: {
        type: "boolean",
        description:
          "It may pull: take snapshots, send them, and delete old ones, but store nothing",
      },
      timeout: HOST_ARGUMENTS.timeout,
      help: HOST_ARGUMENTS.help,
    },
    guardOptions,
    guard,
  ),
  unpin: command(
    " unpin",
    "Forget destinations, so that no snapshot is kept for them.",
    {
      source: positional("The subvolume that was backed up"),
      location: positional("Destinations to forget", false),
      all: {
        type: "boolean",
        description: "Forget every destination; a record that cannot be read is moved aside",
      },
      ...WAIT,
      ...HOST_ARGUMENTS,
    },
    unpinOptions,
    unpin,
  ),
};

/** In which order options are told; what is in none of these is the command's own, and comes first. */
const GROUPS: Readonly<Record<string, readonly string[]>> = {
  "What is taken and kept": [
    "num-snapshots",
    "num-backups",
    "latest-only",
    "no-snapshot",
    "snapshot-folder",
    "snapshot-prefix",
    "before-snapshot",
    "after-snapshot",
    "convert-rw",
    "sync",
  ],
  "What is sent, and how": [
    "no-transfer",
    "no-incremental",
    "no-full",
    "newest-only",
    "backfill",
    "compress",
    "rate-limit",
    "resume",
    "retries",
    "protocol",
  ],
  "Several destinations": [
    "optional",
    "max-age",
    "for",
    "jobs",
    "keep-unsent",
    "drop-unsent",
    "make-room",
    "locked-dests",
    "remove-locks",
    "adopt",
    "skip-fs-checks",
    "skip-space-check",
  ],
  "Stored streams": ["full-every", "encrypt-to", "unverified"],
  "Other hosts, and rights": ["ssh-opt", "ssh-sudo", "sudo", "timeout"],
  "What it tells": [
    "dry-run",
    "wait",
    "verbosity",
    "quiet",
    "json",
    "metrics",
    "no-progress",
    "btrfs-debug",
    "help",
    "version",
  ],
};

/** Words in lines of that many columns, each but the first after as many blanks as `first` is long. */
function wrapped(first: string, text: string, columns: number): string {
  const lines: string[] = [];
  for (const word of text.split(" ")) {
    const last = lines.at(-1);
    if (last !== undefined && first.length + last.length + 1 + word.length <= columns)
      lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
  }
  return lines.map((line, i) => `${i === 0 ? first : " ".repeat(first.length)}${line}\n`).join("");
}

/** An argument as help, the man page and completions tell it: an option as it is given, or the name of a positional. */
export type Told = {
  readonly name: string;
  readonly short: string | null;
  readonly hint: string | null;
  readonly description: string;
  readonly required: boolean;
  readonly repeatable: boolean;
};

/** What there is to tell of a command; `groups` are its options in the order of GROUPS, its own first. */
export function told(command: CommandDef<any>): {
  usage: string;
  description: string;
  positionals: Told[];
  groups: [title: string, options: Told[]][];
} {
  const { name = "", description = "" } = command.meta as { name?: string; description?: string };
  const all = Object.entries(
    command.args as Record<
      string,
      ArgDef & { alias?: string; valueHint?: string; required?: boolean }
    >,
  );
  const tell = ([
    name,
    { alias, valueHint, description = "", required },
  ]: (typeof all)[number]): Told => ({
    name,
    short: alias ?? null,
    hint: valueHint ?? null,
    description,
    required: required !== false,
    repeatable: REPEATABLE.has(name) || SCOPED.has(name),
  });
  const positionals = all.filter(([, { type }]) => type === "positional").map(tell);
  const options = all.filter(([, { type }]) => type !== "positional").map(tell);
  const grouped = Object.values(GROUPS).flat();
  const groups: [string, Told[]][] = [
    ["Options", options.filter(({ name }) => !grouped.includes(name))],
    ...Object.entries(GROUPS).map(([title, names]): [string, Told[]] => [
      title,
      names.flatMap((one) => options.filter(({ name }) => name === one)),
    ]),
  ];
  const usage = [
    name,
    "[OPTIONS]",
    ...positionals.map(({ name, required }) =>
      required ? name.toUpperCase() : `[${name.toUpperCase()}…]`,
    ),
  ].join(" ");
  return {
    usage,
    description,
    positionals,
    groups: groups.filter(([, options]) => options.length > 0),
  };
}

/** What --help says of a command. */
export function helpText(command: CommandDef<any>, columns: number): string {
  const { usage, description, positionals, groups } = told(command);
  const width = Math.min(columns, 100);
  const row = (term: string, text: string) =>
    term.length > 24
      ? `  ${term}\n${wrapped(" ".repeat(28), text, width)}`
      : wrapped(`  ${term}`.padEnd(28), text, width);
  const others = Object.entries(COMMANDS).filter(([other]) => other !== "run");
  return [
    wrapped("Usage: ", usage, width),
    `\n${wrapped("", description, width)}`,
    ...(positionals.length === 0
      ? []
      : [
          "\n",
          ...positionals.map(({ name, description }) => row(name.toUpperCase(), description)),
        ]),
    ...(command === COMMANDS["run"]
      ? [
          "\nOther commands, each with its own --help:\n",
          ...others.map(([other, { meta }]) =>
            row(other, (meta as { description: string }).description),
          ),
        ]
      : []),
    ...groups.flatMap(([title, options]) => [
      `\n${title}:\n`,
      ...options.map(({ name, short, hint, description }) =>
        row(
          `${short === null ? "    " : `-${short}, `}--${name}${hint === null ? "" : ` ${hint}`}`,
          description,
        ),
      ),
    ]),
  ].join("");
}

/** Runs a command with its report, and returns the exit status. */
async function concluded(
  given: Given,
  work: (report: Report) => Promise<void | number>,
): Promise<number> {
  const report = newReport(given.flag("json"), given.flag("dry-run"));
  try {
    return (await work(report)) ?? (report.failed ? 1 : 0);
  } catch (error) {
    if (error instanceof UsageError || error instanceof Interrupted) throw error;
    report.error(null, error);
    report.event("summary", { ok: false });
    return error instanceof Busy ? 3 : 1;
  }
}

function canEnter(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/** Text of UTF-8. Errors: UsageError for other bytes: they would become another path. */
function inUtf8(bytes: Buffer, what: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new UsageError(`${what} is not UTF-8, and would name another path`);
  }
}

/** Which of some words is nearest to one, and how far. */
const nearest = (word: string, words: readonly string[]) =>
  words
    .map((other) => ({ word: other, far: distance(word, other) }))
    .sort((a, b) => a.far - b.far)[0] ?? { word: "", far: Infinity };

/** What people call commands elsewhere. */
const ELSEWHERE: Readonly<Record<string, string>> = {
  status: "list",
  ls: "list",
  snapshots: "list",
  backup: "run",
  send: "run",
  check: "verify",
  diff: "versions",
};

/** Errors: UsageError, where the first word is neither a command nor a path, but nearly a command. */
function notMisspelt(word: string): void {
  if (!/^[a-z]{2,12}$/.test(word) || Object.hasOwn(COMMANDS, word)) return;
  const { word: command, far } = nearest(word, Object.keys(COMMANDS));
  const meant = ELSEWHERE[word] ?? (far <= 2 ? command : undefined);
  if (meant !== undefined)
    throw new UsageError(
      `there is no command ${word}; did you mean "btrfs-backup ${meant}"? (A directory of that name is ./${word}; "btrfs-backup --help" tells all commands)`,
    );
}

const FIRST_WORDS = `btrfs-backup: incremental backups of btrfs subvolumes

  btrfs-backup -N 5 -n '7d 4w 12m' /home /mnt/disk/home     take a snapshot of /home, and send it
  btrfs-backup list /home                                   what there is, here and there
  btrfs-backup restore /mnt/disk/home /home.restored        get it back

"btrfs-backup --help" tells all options, and "btrfs-backup COMMAND --help" those of
another command: ${Object.keys(COMMANDS)
  .filter((name) => name !== "run")
  .join(", ")}.
`;

/** The program, from its arguments to its exit status. */
export async function main(args: readonly string[]): Promise<number> {
  try {
    if (!canEnter("."))
      throw new UsageError(
        "this user cannot enter the current directory: start in another, such as /",
      );
    inUtf8(readFileSync("/proc/self/cmdline"), "an argument");
    const words = expandFiles(args, (path) => inUtf8(readFileSync(path), "it"));
    if (words.length === 0) {
      process.stderr.write(FIRST_WORDS);
      return 2;
    }
    notMisspelt(words[0] as string);
    if (words[0] === "help") {
      const [, about = "run"] = words;
      notMisspelt(about);
      if (!Object.hasOwn(COMMANDS, about))
        throw new UsageError(`there is no command ${about}: ${Object.keys(COMMANDS).join(", ")}`);
      words.splice(0, words.length, about, "--help");
    }
    const named = Object.hasOwn(COMMANDS, words[0] ?? "");
    const command = COMMANDS[named ? (words[0] as string) : "run"] as CommandDef<any>;
    const given = readArguments(named ? words.slice(1) : words, command.args as ArgsDef);
    if (!named && Object.hasOwn(COMMANDS, given.positionals[0] ?? ""))
      throw new UsageError(`the command comes first: btrfs-backup ${given.positionals[0]} …`);
    if (given.flag("version")) console.log(versionText());
    else if (given.flag("help"))
      process.stdout.write(helpText(command, process.stdout.columns || 80));
    else
      return (await command.run?.({
        rawArgs: [...words],
        args: { _: [] } as never,
        cmd: command,
        data: given,
      })) as number;
    return 0;
  } catch (error) {
    if (error instanceof Interrupted) {
      log.error(error.message);
      return statusOfSignal();
    }
    if (!(error instanceof UsageError)) throw error;
    process.stderr.write(visible(`btrfs-backup: ${error.message}\n`));
    return 2;
  }
}

if (import.meta.main) {
  settleEnvironment(process.env);
  stopOnSignals();
  // Nobody reads the events any more: the work is done all the same, but not reported as well done.
  let unheard = false;
  process.stdout.on("error", () => (unheard = true));
  const status = await main(process.argv.slice(2));
  // A pipe may still be full, and its reader asleep: then a signal ends us at once, and time does.
  const written = new Promise<void>((done) =>
    process.stdout.on("error", () => done()).end(() => done()),
  );
  const isHeard = await Promise.race([
    within(LIMITS.parting, written),
    signalled.then(() => within(500, written)),
  ]);
  process.exit(status || statusOfSignal() || (isHeard && !unheard ? 0 : 1));
}
