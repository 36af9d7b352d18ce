#!/usr/bin/env -S bun --config=/dev/null --env-file=/dev/null --tsconfig-override=/dev/null
// btrfs-backup: incremental backups of btrfs subvolumes. The README says what it does for whom;
// this file is all of the program. Below the imports stands a map of it.

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
  statSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { constants as osConstants, tmpdir } from "node:os";
import { basename, dirname, join, normalize, relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import type { ArgDef, ArgsDef, CommandDef, CommandMeta } from "citty";
import type { ProcessPromise } from "zx/core";

// ── A map ────────────────────────────────────────────────────────────────────────────────
//
// A run, in order, with the functions that do it. `main` reads the command line (`readArguments`,
// `runOptions`) and calls `run`, whose one attempt is `backUp`:
//
//  1. `openFinished` finishes a restore that was broken off there, and `openSource` locks SOURCE's
//     snapshot folder and lists it. From here on, no other run with this prefix works there.
//  2. `openAll` begins to open the destinations, each with `openBackups` or `openStore`. These
//     check that it is the same disk, and ours (`judgeClaim`), lock it, and list what stands there.
//     A process on its host holds each place, behind the fence, until it is closed.
//  3. `newSnapshots` takes the snapshot; it waits for no destination but for new ones that are here.
//  4. `openedInTime` waits for the others. One that cannot be opened is told, and the rest go on.
//  5. `planFor` decides for each destination what it gets, and each one's parent (`planTransfers`,
//     `planStreams`: pure). `learnOfParents` asks for what these have to know.
//  6. `sendNext` sends, through one pipeline for all that take the same stream (`transferToAll`).
//     The destination's record announces a name before its stream begins, and the announcement
//     goes when all of its data are on the disk: what is announced is never taken for a backup.
//  7. `remember` writes into SOURCE's record what each destination has. From here on it may rely
//     on the new parent, and no earlier.
//  8. `pruneDestination` and `pruneSource` delete what `planDestination` and `planSource` (pure)
//     found no reason for, by the IDs that were decided on.
//  9. `concludeRun` tells what was done. Places are closed in any case, the source last.
//
// With --recursive, `backUpTree` opens the folders of all subvolumes together (`openMemberFolders`),
// takes all snapshots (`snapshotAll`), and does the rest for each (`backUpMembers`). `runAll` does
// all of it for each argument file.
//
// The sections, each using only those above it (a test says which exceptions there are):
//
//  1. Vocabulary    what snapshots, backups, streams, policies and locations are; errors
//  2. Telling       log, report, progress, summary, metrics, words for numbers
//  3. Hosts         how a verb runs, here or over ssh; locks that are held; pipelines
//  4. Btrfs         the verbs, which are shell scripts, and how their output is read
//  5. Locations     opening places; records; folders, stores and commands as destinations
//  6. Plan          pure: what is sent, kept, claimed, restored
//  7. Transfer      one stream to many takers, and the relay, a stage that looks at what passes
//  8. Commands      run, all, copy, prune, restore, list, verify, versions, drill, unpin, check, setup
//  9. Guard         all of the boundary that a key meets
// 10. Command line  options, argument files, help, exit status

/** The same as in package.json; here, so that this file runs alone. */
export const VERSION = "1.0.0";

/** What scripts/build builds; nothing in the source itself. */
declare const BUILT_FROM: string | undefined;
/** Version, commit and runtime. */
function versionText(): string {
  const { bun, deno, node } = process.versions as Record<string, string | undefined>;
  const other = bun === undefined ? `Node ${node}` : `Bun ${bun}`;
  const runtime = deno === undefined ? other : `Deno ${deno}`;
  return `btrfs-backup ${VERSION} (${typeof BUILT_FROM === "string" ? BUILT_FROM : "from source"}, ${runtime})`;
}

// ── 1. Vocabulary ────────────────────────────────────────────────────────────────────────

/**
 * A subvolume as `btrfs subvolume list` shows it; `path` counts from the filesystem's top level.
 */
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

/**
 * A name in a folder: never empty, `.`, `..`, nor with a slash, a NUL or a line break. Only
 * `entryName` makes one.
 */
export type EntryName = string & { readonly type: "name of an entry" };

/** The name of an entry; null for what can be none. */
export function entryName(text: string): EntryName | null {
  const isOne = text !== "" && text !== "." && text !== ".." && !/[/\n\r\0]/.test(text);
  return isOne ? (text as EntryName) : null;
}

/** A subvolume directly in a folder. */
export type Entry = Subvolume & {
  readonly name: EntryName;
  /** The moment of its data, in ms since 1970, where the place says so. */
  readonly moment: number | null;
  /** A later one was there when it came; it can have been received as a difference to that. */
  readonly belated?: true;
  /** Somebody keeps it, and this is the note: no retention deletes it. */
  readonly kept?: string;
  /**
   * How it is reached from the folder, for a parent that stands elsewhere on its filesystem: see
   * beyondFolder. It is only ever a parent.
   */
  readonly beyond?: string;
};

/** How verbs in a folder name a snapshot. */
const fromFolder = ({ name, beyond }: Pick<Entry, "name" | "beyond">): string => beyond ?? name;

/** An entry that is ours by its name; `time` is the name's wall clock, in ms, as if it were UTC. */
export type Snapshot = Entry & { readonly time: number; readonly moment: number };

/**
 * A stored stream, as the backup that it gives. Its object's name stands for path and UUID, and the
 * stream that it builds on for the parent. `readonly`: it can be restored, since it and all of
 * those are complete.
 */
export type Stream = Entry & {
  readonly moment: number;
  readonly bytes: number;
  readonly owner: StreamOwner;
  /** The UUID that the parent's data goes by; null for a full stream. */
  readonly from: string | null;
  readonly compressed: boolean;
  readonly encrypted: boolean;
  /** It has a checksum object. */
  readonly summed: boolean;
  /** It was stored to its end. */
  readonly stored: boolean;
};

/** What a destination holds of a snapshot: the same facts, seen from the other side. */
export type Backup = Snapshot;

/** The owner of a stream, as its name tells it. */
export type StreamOwner = {
  /** Of the source subvolume. */
  readonly uuid: string;
  /** A digest of its host and path. */
  readonly place: string;
  /** A digest of its first UUID, which stays the same, with its streams, when it is restored. */
  readonly lineage: string;
};

/**
 * What a record says of a chain's owner. `uuid` is the filesystem's where the subvolume has none.
 */
export type SourceIdentity = {
  readonly uuid: string;
  readonly host: string;
  readonly path: string;
};

/** One stream to send: `snapshot` in full, or as the difference to `parent`. */
export type Transfer = {
  readonly snapshot: Snapshot;
  readonly parent: Snapshot | null;
  /** Why not as the difference to the nearest snapshot. */
  readonly why?: string | undefined;
  /** A later one is there already, and may be the parent. */
  readonly belated?: true;
};

/** The snapshot of the last stream that a command took; it may be gone. */
export type Pin = { readonly name: string; readonly uuid: string };

/** What somebody keeps, by the UUID that its data goes by. */
export type KeptOne = Pin & { readonly note: string };

/** A snapshot whose name at a destination is taken by something else. */
export type Conflict = {
  readonly snapshot: Snapshot;
  readonly obstacle: Exclude<Obstacle, { kind: "leftover" }>;
};

/** What has a snapshot's name at a destination, and not its data. A run clears a leftover away. */
export type Obstacle =
  | { readonly kind: "leftover" }
  | { readonly kind: "file" }
  | { readonly kind: "writable" | "edited" | "local" | "other"; readonly backup: Backup };

/** What to keep: nothing is dropped without one. Counts are Infinity for `*`. */
export type Policy = {
  readonly text: string;
  readonly newest: number;
  readonly firstOf: readonly Duration[];
  readonly within: readonly Duration[];
};
type Duration = { readonly count: number; readonly unit: Unit };
export type Unit = keyof typeof UNITS;

/** Something went wrong that the user can read about in `message`: exit status 1. */
export class Failure extends Error {}
/** The command line makes no sense: exit status 2, and nothing was done. */
export class UsageError extends Error {}
/** Another run holds the lock: exit status 3 for a source, a failure for a destination. */
export class Busy extends Error {}
/** A place is not there just now, which is normal for an `--optional` destination. */
export class Absent extends Failure {}
/** Not even the directory that a place would be made in is there. */
class NoDirectoryAbove extends Absent {}
/** A host cannot be reached, or no more. */
export class Unreachable extends Absent {}
/** The stream to send is not the one whose first part is at the destination. */
class OtherStream extends Failure {}
/**
 * A process did nothing for too long. It was ended, or left alone if it does not end. No more is
 * done there.
 */
class Stuck extends Failure {}
/** A pipeline was killed, and did not fail by itself. */
class Killed extends Failure {}
/** The name is taken. */
class Taken extends Failure {}
/** A restore was interrupted when it had begun to change names: see FINISH. */
class Unfinished extends Failure {}
/** The same beside a mounted subvolume, where only the top level of its filesystem leads. */
class MountedUnfinished extends Failure {}
/** Another restore has the names of this second. */
class SameSecond extends Failure {}
/** The user has been told already. */
class AlreadyTold extends Failure {}
/** The user does not want it to be sent like this. */
class Unwanted extends Failure {}
/** The transfer's receiving side has no space left. */
export class NoSpace extends Failure {}
/** The parent on the receiving side is not what the difference was made against. */
export class BadParent extends Failure {}
/** Something that a guarded key may not do: told in one line, and logged. */
export class Refused extends Failure {}
/** A signal ended the run. */
export class Interrupted extends Error {
  constructor(readonly signal: NodeJS.Signals) {
    super(`interrupted by ${signal}`);
  }
}

/** What a run did at the source (`last` is null there), or at a destination. */
export type Figures = {
  sent: number;
  bytes: number;
  seconds: number;
  deleted: number;
  errors: number;
  kept: number | null;
  last: string | null;
  /** Bytes that are free there: when it was opened, less what was sent. */
  free: number | null;
  /** The first thing that went wrong. */
  why: string | null;
};

/** What a command tells: log lines to people, events to programs; and whether anything failed. */
export type Report = {
  failed: boolean;
  /** How many events of each kind there were. */
  readonly tally: Record<string, number>;
  /** What was done at each place; null is the source. */
  readonly figures: Map<string | null, Figures>;
  readonly event: (event: string, fields: Record<string, unknown>) => void;
  readonly warning: (message: string) => void;
  readonly error: (destination: string | null, error: unknown) => void;
};

/** Map.groupBy, which Node 20 has not. */
function groupBy<K, T>(all: readonly T[], by: (one: T) => K): Map<K, T[]> {
  const groups = new Map<K, T[]>();
  for (const one of all) {
    const group = groups.get(by(one));
    if (group === undefined) groups.set(by(one), [one]);
    else group.push(one);
  }
  return groups;
}

/**
 * Text as a person sees it, whoever wrote it, with escapes for characters that would move a
 * terminal's cursor, change its title or turn text around: C0 but for the line break, C1, and
 * Unicode's bidirectional controls. All that is shown passes here; JSON escapes by itself.
 */
export const visible = (text: string) =>
  text.replace(
    /[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );

/** Shows a command's result. */
const print = (text: string) => void process.stdout.write(visible(text));

const twoDigits = (n: number) => String(n).padStart(2, "0");

/** `YYYYMMDD-HHMMSS` of a date in local time. */
export function stamp(date: Date): string {
  const day = `${String(date.getFullYear()).padStart(4, "0")}${twoDigits(date.getMonth() + 1)}${twoDigits(date.getDate())}`;
  return `${day}-${twoDigits(date.getHours())}${twoDigits(date.getMinutes())}${twoDigits(date.getSeconds())}`;
}

/** The wall clock of a local date, counted like a snapshot's `time`. */
export const wallClock = (date: Date) => parseName(stamp(date), "") as number;

/**
 * When a local clock showed `time`, in ms since 1970; the second time, if it did so twice and the
 * first was before `earliest`.
 */
export function momentOf(time: number, earliest = -Infinity): number {
  const utc = new Date(time);
  // The calendar is the same every 400 years, and Date takes years below 100 for those of the 20th
  // century.
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
  if (first >= earliest) return first;
  const laters = [30, 60].map((minutes) => first + minutes * 60e3);
  return laters.find((later) => wallClock(new Date(later)) === time) ?? first;
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

/** Whether a text can stand before the date. */
const isPrefix = (text: string) => !/[/\x00-\x1f\x7f]/.test(text) && Buffer.byteLength(text) <= 200;

/** The beginning of a name that ends in a date as ours do; null for all others. */
const prefixOf = (name: string) => (timeIn(name) === null ? null : name.slice(0, -15));

/** The time in a name with whatever prefix. */
const timeIn = (name: string) => parseName(name, name.slice(0, -15));

/**
 * Finds, among subvolumes of one place, the one that holds a snapshot's data. UUIDs decide, never
 * names: it was received from the snapshot, or from where the snapshot was, or the snapshot from
 * it.
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
function monthsBefore(time: number, months: number): number {
  const date = new Date(time);
  const day = date.getUTCDate();
  date.setUTCDate(1);
  date.setUTCMonth(date.getUTCMonth() - months);
  // A month before the 31st is the last day of a shorter month, not the first days of the next.
  const last = new Date(Date.UTC(date.getUTCFullYear(), date.getUTCMonth() + 1, 0)).getUTCDate();
  date.setUTCDate(Math.min(day, last));
  return Number.isNaN(date.getTime()) ? -Infinity : date.getTime();
}

/** A unit of policies and durations. */
type UnitOfTime = {
  readonly noun: string;
  /** The number of the period that a wall-clock time lies in, counted from 1970. */
  readonly period: (time: number) => number;
  /** The moment so many of them before a time. */
  readonly before: (time: number, count: number) => number;
};
/** A unit of so many ms; its first period begins `early` ms before 1970. */
const ofLength = (noun: string, length: number, early = 0): UnitOfTime => ({
  noun,
  period: (time) => Math.floor((time + early) / length),
  before: (time, count) => time - count * length,
});
const UNITS = {
  h: ofLength("hour", DURATION.h),
  d: ofLength("day", DURATION.d),
  // ISO weeks begin on Monday, and 1970-01-01 was a Thursday.
  w: ofLength("week", 7 * DURATION.d, 3 * DURATION.d),
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
const periodOf = (time: number, unit: Unit) => UNITS[unit].period(time);

/** The moment `count` units before `time`. */
export const momentBefore = (time: number, count: number, unit: Unit) =>
  count === Infinity ? -Infinity : UNITS[unit].before(time, count);

const POLICY_WORD = new RegExp(`^(\\d+|\\*)([${LETTERS.join("")}]?)(\\+?)$`);
const DURATION_WORD = new RegExp(`^(\\d+)([${LETTERS.join("")}])$`);

/** Reads a word of a POLICY. Errors: UsageError. */
function parsePolicyWord(word: string) {
  const [, number = "", unit = "", plus = ""] = POLICY_WORD.exec(word) ?? [];
  const count = number === "*" ? Infinity : Number(number);
  const isCount = count > 0 && (count === Infinity || Number.isSafeInteger(count));
  if (!isCount || (unit === "" && (plus !== "" || count === Infinity)))
    throw new UsageError(
      `"${word}" is not a retention policy: a number, or words like 24h 7d 4w 12m 10y 14d+`,
    );
  return { count, unit, plus };
}

/** Reads a POLICY; null is "keep everything" (`0`). */
export function parsePolicy(text: string): Policy | null {
  if (text.trim() === "0") return null;
  const seen = new Set<string>();
  const policy = { text, newest: 0, firstOf: [] as Duration[], within: [] as Duration[] };
  const words = text.trim().replace(/^\+(?=\d+$)/, "");
  for (const word of words.split(/\s+/)) {
    const { count, unit, plus } = parsePolicyWord(word);
    if (seen.has(unit + plus))
      throw new UsageError(`retention policy "${text}" says "${unit + plus || "a number"}" twice`);
    seen.add(unit + plus);
    if (unit === "") policy.newest = count;
    else (plus ? policy.within : policy.firstOf).push({ unit: unit as Unit, count });
  }
  return policy;
}

/** Reads a DURATION like `3d`. */
export function parseDuration(text: string): Duration {
  const match = DURATION_WORD.exec(text);
  if (!match)
    throw new UsageError(
      `"${text}" is not a duration: a number with ${LETTERS.slice(0, -1).join(", ")} or ${LETTERS.at(-1)}`,
    );
  return { count: Number(match[1]), unit: match[2] as Unit };
}

/** Bytes with k, m or g for powers of 1024. Errors: UsageError, which says `what` was expected. */
function bytesIn(text: string, what: string): number {
  const [, number = "", unit = ""] = /^(\d+(?:\.\d+)?)([kmg]?)$/i.exec(text) ?? [];
  const bytes = Math.floor(Number(number) * 1024 ** " kmg".indexOf(unit.toLowerCase() || " "));
  if (bytes < 1 || bytes > Number.MAX_SAFE_INTEGER)
    throw new UsageError(`"${text}" is not a ${what}, with k, m or g for powers of 1024`);
  return bytes;
}

/** Reads a RATE in bytes a second. */
export const parseRate = (text: string) => bytesIn(text, "rate: bytes a second");

/** Reads a SIZE in bytes. */
export const parseSize = (text: string) => bytesIn(text, "size: bytes");

/** How much of a destination stays free: bytes, or a share of it; and the newest that do not go. */
export type MinFree = {
  readonly text: string;
  readonly bytes: number;
  readonly share: number;
  readonly newest: number;
};

/** Reads the value of --min-free, with that of --min-keep. */
export function parseMinFree(text: string, newest: number): MinFree {
  const [, percent] = /^(\d{1,2}(?:\.\d+)?)%$/.exec(text) ?? [];
  if (percent !== undefined && Number(percent) > 0)
    return { text, bytes: 0, share: Number(percent) / 100, newest };
  if (text.endsWith("%"))
    throw new UsageError(`"${text}" is not a share of a destination, like 10%`);
  return { text, bytes: bytesIn(text, "size like 50g, or a share like 10%"), share: 0, newest };
}

/** The bytes that are to be free on a filesystem of that size. */
export const freeOf = ({ bytes, share }: MinFree, size: number) => Math.ceil(bytes + share * size);

/** Characters that turn or hide text on a terminal, in a value and as JSON escapes them. */
const HIDDEN = /[\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|\\u00[01]|\\[bfnrt]/;

/** Checks the note of what is kept. Errors: UsageError. */
export function parseNote(text: string): string {
  // It stands in a record, which a guarded key has to write with it.
  if (text.length > 200 || text.includes("\\") || HIDDEN.test(JSON.stringify(text)))
    throw new UsageError(
      "--note: one line of at most 200 characters, without backslashes and control characters",
    );
  return text;
}

/** A note as it is shown, whoever wrote the file that it is in: one line, and not a long one. */
export const shownNote = (text: string) => text.replace(/\s+/g, " ").slice(0, 200);

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
/**
 * A place that can be looked at: a btrfs folder, a folder of stored streams, or a remote of rclone
 * with such, whose `path` names it to rclone.
 */
export type Readable = {
  readonly kind: "folder" | "raw" | "rclone";
  readonly id: string;
  readonly host: HostName | null;
  readonly path: string;
  /** The process in whose mount namespace the path is: see TOP. */
  readonly namespace?: string;
};

type Kind = Location["kind"];

/**
 * What is asked of a kind of location. A new kind does not compile until each question has an
 * answer, here and in the tables that are typed by `Kind`.
 */
type Traits = {
  /** As a message calls it. */
  readonly called: string;
  /** In which form backups are there; null where nobody can ask. */
  readonly holds: "subvolumes" | "streams" | null;
  /** Whether verbs work in it, lock it, and can resume there. Else its lock is at the source. */
  readonly isDirectory: boolean;
};

const KINDS = {
  folder: { called: "a folder of subvolumes", holds: "subvolumes", isDirectory: true },
  raw: { called: "stored streams", holds: "streams", isDirectory: true },
  rclone: { called: "stored streams", holds: "streams", isDirectory: false },
  shell: { called: "a command", holds: null, isDirectory: false },
} satisfies Record<Kind, Traits>;

const holdsStreams = ({ kind }: Pick<Location, "kind">) => KINDS[kind].holds === "streams";
const holdsSubvolumes = ({ kind }: Pick<Location, "kind">) => KINDS[kind].holds === "subvolumes";
const isReadable = (location: Location): location is Readable =>
  KINDS[location.kind].holds !== null;
const isDirectory = (location: Location): location is Readable => KINDS[location.kind].isDirectory;

/** The place of a path below another; for a command it is the command itself. */
function placeBelow<T extends Location>(location: T, path: string): T {
  if (path === "" || location.kind === "shell") return location;
  if (location.kind === "rclone") {
    const between = /[:/]$/.test(location.id) ? "" : "/";
    return {
      ...location,
      id: `${location.id}${between}${path}`,
      path: `${location.path}${path}/`,
    };
  }
  const below = (one: string) => `${one}${one.endsWith("/") ? "" : "/"}${path}`;
  return { ...location, id: below(location.id), path: below(location.path) };
}

export type HostName = {
  readonly user: string | null;
  readonly name: string;
  readonly port: string | null;
};

/** Reads a SOURCE or LOCATION; relative paths count from the current directory. */
export function parseLocation(text: string): Location {
  const [, scheme, rest = ""] = /^([a-z][a-z0-9+]*):\/\/(.*)$/s.exec(text) ?? [];
  switch (scheme) {
    case "shell":
      if (rest.trim() === "") throw new UsageError("shell:// needs a command");
      return { kind: "shell", id: text, command: rest };
    case "ssh":
      return parseOnHost(scheme, rest, "folder");
    case "raw+ssh":
      return parseOnHost(scheme, rest, "raw");
    case "raw": {
      if (!rest.startsWith("/") || rest.includes("\0"))
        throw new UsageError(`"${text}" is not of the form raw:///path`);
      const path = withoutSlash(normalize(rest));
      return { kind: "raw", id: `raw://${path}`, host: null, path };
    }
    case "rclone":
      return parseRemote(text, rest);
    case undefined:
      return text.startsWith("rclone:")
        ? parseRemote(text, text.slice("rclone:".length))
        : parseFolder(text);
    default:
      throw new UsageError(
        `"${scheme}://" is no kind of location; there are /path, ssh://[user@]host[:port]/path, raw:///path, raw+ssh://[user@]host[:port]/path, rclone://REMOTE:PATH and shell://COMMAND`,
      );
  }
}

/** Reads a place on another host. Errors: UsageError. */
function parseOnHost(scheme: string, rest: string, kind: "folder" | "raw"): Readable {
  const match = /^(?:([^/]*)@)?(\[[^\]/]+\]|[^:/@]+)(?::(\d+))?(\/.*)$/s.exec(rest);
  if (!match)
    throw new UsageError(
      `"${scheme}://${rest}" is not of the form ${scheme}://[user@]host[:port]/path`,
    );
  // csh cannot quote a newline, and one host's files are read by many shells.
  if (/[\n\r\0]/.test(rest))
    throw new UsageError("a path on another host cannot contain a line break");
  const [, user = null, name = "", port = null, written = "/"] = match;
  const path = withoutSlash(normalize(written));
  const login = user === null ? "" : `${user}@`;
  return {
    kind,
    id: `${scheme}://${login}${name}${port === null ? "" : `:${port}`}${path}`,
    host: { user, name: name.replace(/^\[|\]$/g, ""), port },
    path,
  };
}

/** Reads the REMOTE:PATH of rclone. Errors: UsageError. */
function parseRemote(text: string, remote: string): Readable {
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

/** Reads a path on this host. Errors: UsageError. */
function parseFolder(text: string): Readable {
  const [, login, there = ""] = /^([^/:\s]+):([/~].*)$/s.exec(text) ?? [];
  if (login !== undefined)
    throw new UsageError(
      `"${text}" is not a path: write ssh://${login}${there.startsWith("/") ? there : "/path"}, or ./${text} for a directory here`,
    );
  if (text === "" || text.includes("\0")) throw new UsageError("a path cannot be empty");
  const path = resolve(text);
  return { kind: "folder", id: path, host: null, path };
}

const withoutSlash = (path: string) => (path.length > 1 ? path.replace(/\/+$/, "") || "/" : path);

/** Whether `path` is `folder` or below it. */
const isWithin = (path: string, folder: string) =>
  path === folder || path.startsWith(folder === "/" ? "/" : `${folder}/`);

/**
 * The moment of a `YYYY-MM-DD[ HH:MM[:SS]]`, counted like a snapshot's `time`; missing parts are
 * zero.
 */
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
  const units = [
    [365 * DURATION.d, "year"],
    [30 * DURATION.d, "month"],
    [DURATION.d, "day"],
    [DURATION.h, "hour"],
    [60e3, "minute"],
  ] as const;
  const [size, noun] = units.find(([length]) => span >= 2 * length) ?? [1e3, "second"];
  return plural(Math.max(0, Math.floor(span / size)), noun);
}

type NamedTime = { readonly name: string; readonly time: number };

/**
 * Orders entries by the time in their names. Those that have a rank (a place in the source's own
 * order, by subvolume ID) stand in that order among themselves: names repeat when clocks go back.
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
 * The entries that are ours by name, oldest first. Snapshots of the source as it is now are newer
 * than all that came with it when it was restored, and IDs tell their order. IDs of received
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

/**
 * Moves entries that stand before their parents to behind them: a difference is newer than its
 * parent, whatever the names say, unless it is known to be older.
 */
function behindParents<T extends Entry>(entries: readonly T[]): T[] {
  const standing = byUuid(entries);
  const placed = new Set<T>();
  const older = (one: T) => (one.belated ? undefined : standing.get(one.parentUuid ?? ""));
  for (const entry of entries) {
    const line = [entry];
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

const plural = (n: number, noun: string) => `${n} ${noun}${n === 1 ? "" : "s"}`;

/** What the same data is called wherever it is: streams say this UUID of a snapshot. */
const dataOf = ({ uuid, receivedUuid }: Subvolume) => receivedUuid ?? uuid;

/** How a stream is changed before it is stored or a command gets it; the recipients are gpg's. */
export type Filters = { readonly level: string; readonly recipients: readonly string[] };

/** The end of a filtered stream's name. */
const suffixOf = ({ level, recipients }: Filters) =>
  `.btrfs${level === "" ? "" : ".zst"}${recipients.length === 0 ? "" : ".gpg"}`;

/**
 * The longest prefix with which a stored stream's name, with all that is put around it, stays below
 * 255 bytes.
 */
export const STREAM_PREFIX_BYTES = 70;

/**
 * What the names of streams say of a source. The top level of an old filesystem, and a folder that
 * is copied from, may have no UUID of their own.
 */
export function ownerOf({ uuid, host, path }: SourceIdentity): StreamOwner {
  const digest = digestOf(uuid);
  const isUuid = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(uuid);
  return {
    uuid: isUuid ? uuid : digest.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12}).*$/, "$1-$2-$3-$4-$5"),
    place: digestOf(`${host}:${path}`).slice(0, 8),
    lineage: digest.slice(0, 8),
  };
}

/**
 * The name of a stored stream, which says all that list and restore must know:
 * NAME+HHMM_PLACE_LINEAGE_SOURCE_UUID_PARENT.btrfs[.zst][.gpg], with + before PARENT if it is
 * belated.
 */
export function streamName(
  { snapshot, parent, belated }: Transfer,
  { place, lineage, uuid }: StreamOwner,
  filters: Filters,
): string {
  const minutes = Math.round((snapshot.time - snapshot.moment) / 60e3);
  const [hours, rest] = [Math.floor(Math.abs(minutes) / 60), Math.abs(minutes) % 60];
  const name = `${snapshot.name}${minutes < 0 ? "-" : "+"}${twoDigits(hours)}${twoDigits(rest)}`;
  const from = `${belated ? "+" : ""}${parent === null ? "full" : dataOf(parent)}`;
  return [name, place, lineage, uuid, dataOf(snapshot), from].join("_") + suffixOf(filters);
}

const STREAM =
  /^(.*\d{8}-\d{6})([+-])(\d\d)(\d\d)_([0-9a-f]{8})_([0-9a-f]{8})_([0-9a-f-]{36})_([0-9a-f-]{36})_(\+?(?:full|[0-9a-f-]{36}))\.btrfs(\.zst)?(\.gpg)?$/s;
const SUM = ".sha256";
/** The end of the name of a small object that says that somebody keeps the stream of that name. */
const KEPT_MARK = ".kept";

export type StoredFile = { readonly name: string; readonly bytes: number };

/**
 * A stored file as a stream, by its name. `summed`: it has a checksum object. `whole`: see
 * parseStreams.
 */
function parseStream(
  { name: object, bytes }: StoredFile,
  summed: boolean,
  whole: boolean,
): Stream | null {
  const [, text = "", sign, hours, minutes, place = "", lineage = "", ...others] =
    STREAM.exec(object) ?? [];
  const [uuid = "", receivedUuid = "", from = "", zst, gpg] = others;
  const [name, time] = [entryName(text), timeIn(text)];
  if (name === null || time === null || entryName(object) === null) return null;
  const offset = (Number(hours) * 60 + Number(minutes)) * 60e3;
  return {
    id: 0,
    path: object,
    name,
    uuid: object,
    receivedUuid,
    parentUuid: null,
    readonly: false,
    moment: time - (sign === "-" ? -offset : offset),
    bytes,
    owner: { uuid, place, lineage },
    from: from.endsWith("full") ? null : from.replace("+", ""),
    ...(from.startsWith("+") ? { belated: true as const } : {}),
    compressed: zst !== undefined,
    encrypted: gpg !== undefined,
    summed,
    stored: summed || whole,
  };
}

/** Stored streams by what they build on. */
type Children = ReadonlyMap<string | null, readonly Stream[]>;

/**
 * The streams that can be restored, by UUID, with their parents. From the full streams up: of two
 * streams with the same data, the one that needs less stands for both.
 */
function restorableAmong(children: Children): Map<string, Stream> {
  const found = new Map<string, Stream>();
  const reached = new Set<string | null>();
  const isFirst = (data: string | null) => !reached.has(data) && reached.add(data);
  const on = (data: string | null, parentUuid: string | null) =>
    (children.get(data) ?? []).map((one) => ({ ...one, parentUuid, readonly: true }));
  for (let next = on(null, null); next.length > 0;) {
    for (const one of next) found.set(one.uuid, one);
    next = next
      .filter(({ receivedUuid }) => isFirst(receivedUuid))
      .flatMap(({ receivedUuid, uuid }) => on(receivedUuid, uuid));
  }
  return found;
}

/**
 * The snapshot of which a file is a part of a stream, or what stands beside one, without its
 * stream; else null.
 */
function remainsOf(file: string, files: ReadonlySet<string>): string | null {
  const part = /^\.(.*?)(?:\.sha256|\.kept|\.p[0-2]-\d*)?\.part$/s.exec(file)?.[1];
  const beside = [SUM, KEPT_MARK].find((end) => file.endsWith(end)) ?? "";
  const stream = beside === "" ? "" : file.slice(0, -beside.length);
  const [, name] = STREAM.exec(part ?? (files.has(stream) ? "" : stream)) ?? [];
  return name === undefined || prefixOf(name) === null ? null : name;
}

/**
 * What a store holds, by its listing alone. `whole`: it cannot hold half a stream, since it renames
 * complete ones, or its user says so; else a stream without a checksum object is incomplete.
 * `debris`: what broken transfers left, by the snapshot. One upload at a time leaves one stream at
 * most, on which nothing builds, and which nobody could keep; of any other, the checksum object must
 * have got lost, and it is no debris but `unsummed`.
 */
export function parseStreams(
  files: readonly StoredFile[],
  whole: boolean,
): { streams: Stream[]; debris: Map<string, string[]>; unsummed: Stream[] } {
  const names = new Set(files.map(({ name }) => name));
  const found = files
    .flatMap((file) => parseStream(file, names.has(file.name + SUM), whole) ?? [])
    .map((one) => (names.has(one.uuid + KEPT_MARK) ? { ...one, kept: "" } : one));
  const children = groupBy(
    found.filter(({ stored }) => stored),
    ({ from }) => from,
  );
  const restorable = restorableAmong(children);
  const streams = found
    .map((one) => restorable.get(one.uuid) ?? one)
    .sort((a, b) => a.moment - b.moment);
  const debris = new Map<string, string[]>();
  const add = (name: string, object: string) =>
    debris.set(name, [...(debris.get(name) ?? []), object]);
  for (const { name: file } of files) {
    const name = remainsOf(file, names);
    if (name !== null) add(name, file);
  }
  const unsummed: Stream[] = [];
  const unstored = streams.filter(({ stored }) => !stored);
  for (const some of groupBy(unstored, ({ name }) => prefixOf(name)).values()) {
    const [first] = some;
    const isBroken = some.length === 1 && first?.kept === undefined;
    if (first !== undefined && isBroken && !children.has(first.receivedUuid))
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
// Before anything else is loaded, since each stream waits for it, and before any signal has a
// handler: see `relay`.
if (import.meta.main && process.argv[2] === RELAY)
  relay(JSON.parse(process.argv[3] ?? "{}") as Relay);

const { defineCommand } = await import("citty");
const { createConsola } = await import("consola/basic");
const { $, which } = await import("zx/core");

// ── 2. Telling ───────────────────────────────────────────────────────────────────────────

export const LEVELS = { error: 0, warning: 1, info: 3, debug: 4 } as const;

/**
 * What a run has for itself, since `all` does several in one process: how loud it is, and how long
 * it waits for what does nothing.
 */
type Setting = {
  /** One of LEVELS. */
  level: number;
  /** In ms; see LIMITS. */
  stuck: number;
  parting: number;
  /** With the level debug, the scripts that run are shown as well. */
  scripts: boolean;
  /** Which of several runs it is; null where there is only one. */
  readonly member: {
    /** The name of its argument file; null for what concerns all of them. */
    readonly name: string | null;
    /** Its SOURCE, as far as that is known. */
    source: string | null;
  } | null;
};

const newSetting = (member: Setting["member"]): Setting => ({
  level: LEVELS.info,
  stuck: 3600e3,
  parting: 10e3,
  scripts: false,
  member,
});

const ONLY = newSetting(null);
const settings = new AsyncLocalStorage<Setting>();
/** The setting of the run that asks. */
const setting = (): Setting => settings.getStore() ?? ONLY;

/** What a line begins with, where it could be of any of several runs. */
function lineOwner(): string {
  const name = setting().member?.name ?? null;
  return name === null ? "" : `${name}: `;
}

const NO_PROCESS = "no process can be started: see ulimit -n and -u, and the memory that is free";

/**
 * A line at the bottom of a terminal for each stream that is under way. All other text goes above.
 */
class Terminal {
  readonly #lines = new Map<object, string>();
  #drawn = 0;
  /** Shows a line for something, or none any more. */
  show(whose: object, line: string | null): void {
    if (line === null) this.#lines.delete(whose);
    else this.#lines.set(whose, line);
    this.write("");
  }
  /** The terminal itself has written "^C": what comes begins at the left again. */
  interrupted(): void {
    if (this.#drawn > 0) process.stderr.write("\r");
  }
  write(text: string): void {
    if (this.#drawn > 0) process.stderr.write(`\x1b[${this.#drawn}A\x1b[J`);
    if (text !== "") process.stderr.write(text);
    for (const line of this.#lines.values()) process.stderr.write(`${line}\n`);
    this.#drawn = this.#lines.size;
  }
}
const terminal = new Terminal();

/** Whether stderr is a terminal that knows colours and can move its cursor. */
const canDraw = () => process.stderr.isTTY && process.env["TERM"] !== "dumb";

/** The log: lines for people, on stderr. */
export const log = createConsola({
  level: LEVELS.debug,
  reporters: [
    {
      log({ type, args, level }) {
        if (level > setting().level) return;
        const colour =
          !canDraw() || process.env["NO_COLOR"]
            ? null
            : ({ error: "31", warn: "33", debug: "2" }[type as string] ?? "36");
        terminal.write(
          `${colour === null ? `[${type}]` : `\x1b[${colour}m[${type}]\x1b[0m`} ${visible(`${lineOwner()}${args.join(" ")}`)}\n`,
        );
      },
    },
  ],
});

/** Bytes as people read them, in powers of 1024. */
export const inBytes = (bytes: number) => {
  const unit = Math.min(5, Math.max(0, Math.floor(Math.log2(Math.max(bytes, 1)) / 10)));
  return `${unit === 0 ? bytes : (bytes / 2 ** (10 * unit)).toFixed(1)}${"BKMGTP"[unit]}`;
};

function figuresOf(places: Report["figures"], id: string | null): Figures {
  const counts = { sent: 0, bytes: 0, seconds: 0, deleted: 0, errors: 0 };
  const none = { ...counts, kept: null, last: null, free: null, why: null };
  const place = places.get(id) ?? none;
  places.set(id, place);
  return place;
}

/** What the system is short of, where an error says so; null for any other. */
function lackOf(error: unknown): string | null {
  const { code, path = "" } = error as NodeJS.ErrnoException;
  if (code === "EMFILE" || code === "ENFILE") return "too many files are open: see ulimit -n";
  if (code === "EAGAIN" || code === "ENOMEM") return NO_PROCESS;
  if ((code === "ENOSPC" || code === "EDQUOT") && path.includes("btrfs-backup."))
    return `there is no space left for ${path}`;
  return null;
}

/** What an error says. One that is not our own is a mistake of ours: its stack tells where. */
const messageOf = (error: unknown) =>
  error instanceof Failure || error instanceof Busy
    ? error.message
    : (lackOf(error) ?? String((error as Error)?.stack ?? error));

/**
 * A word for any login shell. `'`, `\` and `!` stand outside the quotes behind a backslash: fish
 * reads `\'` inside quotes, csh expands `!` there.
 */
export const quote = (word: string) => `'${word.replace(/['\\!]/g, (c) => `'\\${c}'`)}'`;

/** A word of a command that is shown, quoted only if it must be. */
const shellWord = (word: string) => (/^[\w./:@+-]+$/.test(word) ? word : quote(word));

/** How ssh is called for a host as locations name it. */
function sshCommand(authority: string): string {
  const [, host = "", port] = /^(.*?)(?::(\d+))?$/.exec(authority) ?? [];
  return `${port === undefined ? "" : `-p ${port} `}${shellWord(host)}`;
}

/** Errors with the next command, by what the error says. */
const ADVICE: readonly (readonly [RegExp, (found: string) => string])[] = [
  [
    /ssh:\/\/([^/\s]+)\/.*Host key verification failed/s,
    (host) => `log in once as the user of this run, and compare the key: ssh ${sshCommand(host)}`,
  ],
  [
    /ssh:\/\/([^/\s]+)\/.*Permission denied \([a-z]/s,
    (host) =>
      `give it the key of the user of this run: ssh-copy-id ${sshCommand(host)}; or name another key: --ssh-opt IdentityFile=FILE`,
  ],
  [
    /^(?:[^\n]*: )?no such directory: (\/[^\n]*?) \(is the disk mounted\?\)$/,
    (path) =>
      `see which filesystem is there: findmnt -T ${shellWord(path)}; if it is the right one: mkdir -p ${shellWord(path)}`,
  ],
];

/** The next command after an error; null where there is none to name. */
export function adviceOn(message: string): string | null {
  for (const [shape, advice] of ADVICE) {
    const found = shape.exec(message)?.[1];
    if (found !== undefined) return advice(found);
  }
  return null;
}

function newReport(json: boolean, dryRun: boolean): Report {
  const tally: Report["tally"] = {};
  const places: Report["figures"] = new Map();
  const event: Report["event"] = (name, fields) => {
    tally[name] = (tally[name] ?? 0) + 1;
    if (name === "transfer") {
      const place = figuresOf(places, fields["destination"] as string);
      place.sent++;
      place.bytes += (fields["bytes"] as number | null) ?? 0;
    }
    const { member } = setting();
    const whose = member === null ? {} : { args: member.name, source: member.source };
    const line = { event: name, ...whose, ...fields, ...(dryRun ? { dry_run: true } : {}) };
    if (json) process.stdout.write(`${JSON.stringify(line)}\n`);
  };
  const report: Report = {
    failed: false,
    tally,
    figures: places,
    event,
    warning(message) {
      log.warn(message);
      event("warning", { message });
    },
    error(destination, error) {
      if (error instanceof Interrupted) throw error;
      if (error instanceof AlreadyTold) return;
      const message = messageOf(error);
      report.failed = true;
      const place = figuresOf(places, destination);
      place.errors++;
      place.why ??= message;
      const isNamed = destination === null || message.startsWith(destination);
      const whole = isNamed ? message : `${destination}: ${message}`;
      const advice = adviceOn(whole);
      log.error(advice === null ? whole : `${whole}\n        ${advice}`);
      event("error", { destination, message, ...(advice === null ? {} : { advice }) });
    },
  };
  return report;
}

/**
 * What is shown of transfers: `progress` draws a line, `news` logs one every so many ms; `sizes`: a
 * full stream's bytes by UUID, where quotas tell them.
 */
type Display = Readonly<{
  progress: boolean;
  news: number | null;
  btrfsDebug: boolean;
  sizes: Map<string, number>;
}>;

/** So often what takes long, a transfer or a verify, is told where nothing can be drawn; in ms. */
const NEWS = 600e3;

/** What options ask to show; a bar only where there is a terminal to draw it on. */
function displayOf({ progress, btrfsDebug }: Pick<Display, "progress" | "btrfsDebug">): Display {
  if (progress && !canDraw())
    log.debug("no progress is drawn: stderr is no terminal that can move its cursor");
  const isDrawn = progress && canDraw();
  return {
    progress: isDrawn,
    news: progress && !isDrawn ? NEWS : null,
    btrfsDebug,
    sizes: new Map(),
  };
}

/** Of a stream, so many bytes have passed in so many seconds; `size` where it is known. */
type Flow = Readonly<{
  name: string;
  bytes: number;
  size: number | undefined;
  seconds: number;
}>;

/** Seconds as a clock shows them. */
const asClock = (s: number) =>
  `${Math.floor(s / 3600)}:${twoDigits(Math.floor(s / 60) % 60)}:${twoDigits(Math.floor(s) % 60)}`;

/** Bytes a second, which part has passed, and the seconds that are left. */
function paceOf({ bytes, seconds }: Flow, size: number) {
  const rate = bytes / Math.max(seconds, 1);
  const done = size === 0 ? 1 : Math.min(1, bytes / size);
  return { rate, done, left: rate === 0 ? 0 : Math.max(0, size - bytes) / rate };
}

/** A name in so many characters: a long one lacks its middle, since its end tells where to. */
function fitted(name: string, room: number): string {
  const what = visible(name);
  if (what.length <= room) return what.padEnd(Math.min(room, 40));
  const begin = Math.min(8, Math.max(0, Math.floor((room - 1) / 3)));
  const end = Math.max(0, room - 1 - begin);
  return `${what.slice(0, begin)}…${end === 0 ? "" : what.slice(-end)}`;
}

/** How wide the bar of a progress line is: less where the name needs the room. */
const BAR = { most: 20, least: 5 } as const;

/** One line about a stream. */
export function progressLine({ columns, ...flow }: Flow & { readonly columns: number }): string {
  const { name, bytes, size, seconds } = flow;
  const { rate, done, left } = paceOf(flow, size ?? 0);
  const figures = ` ${inBytes(bytes).padStart(7)} ${inBytes(Math.floor(rate)).padStart(7)}/s ${asClock(seconds)}`;
  if (size === undefined) return `${fitted(name, columns - 1 - figures.length)}${figures}`;
  const ahead = ` ${String(Math.floor(done * 100)).padStart(3)}% ${asClock(left)} left`;
  const room = columns - 2 - figures.length - ahead.length;
  const width = Math.min(BAR.most, Math.max(BAR.least, room - visible(name).length));
  const bar = `${"=".repeat(Math.floor(done * (width - 1)))}>`.padEnd(width);
  return `${fitted(name, room - width)}${figures} ${bar}${ahead}`;
}

/** What the log says of a stream that takes long. */
export function progressNews(flow: Flow): string {
  const { name, bytes, size, seconds } = flow;
  const { rate, done, left } = paceOf(flow, size ?? 0);
  const so = `${name}: ${inBytes(bytes)} in ${asClock(seconds)}, ${inBytes(Math.floor(rate))}/s`;
  if (size === undefined) return so;
  return `${so}; ${Math.floor(done * 100)} % of some ${inBytes(size)}, ${asClock(left)} left`;
}

/** What was done at each place, the source first. */
export const summaryOf = (source: string, places: ReadonlyMap<string | null, Figures>): string =>
  alignedTable([["", ...SUMMED], ...summaryRows(source, places)]).trimEnd();

/** What a summary tells of each place. */
const SUMMED = ["sent", "bytes", "time", "deleted", "kept", "free", ""] as const;

/** So many characters a summary says of an error, whose own line has all of it. */
const SUMMED_ERROR = 60;

/** An error in a cell of a table. */
function inShort(id: string | null, message: string): string {
  const [line = ""] = message.split("\n");
  const own = id !== null && line.startsWith(`${id}: `) ? line.slice(id.length + 2) : line;
  return own.length > SUMMED_ERROR ? `${own.slice(0, SUMMED_ERROR - 1)}…` : own;
}

/** A row for each place, the source first. */
function summaryRows(source: string, places: ReadonlyMap<string | null, Figures>): string[][] {
  return [...places]
    .sort(([a], [b]) => Number(b === null) - Number(a === null))
    .map(([id, { sent, bytes, seconds, deleted, kept, free, errors, why }]) => [
      id ?? source,
      ...(id === null ? ["", ""] : [String(sent), inBytes(bytes)]),
      `${seconds.toFixed(1)} s`,
      String(deleted),
      kept === null ? "" : String(kept),
      free === null ? "" : inBytes(free),
      errors === 0 ? "" : `failed${why === null ? "" : `: ${inShort(id, why)}`}`,
    ]);
}

/** Columns as wide as their widest cell. */
export function alignedTable(rows: readonly (readonly string[])[]): string {
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

/** What was done at the places of a source; `now`: when its run ended, in ms since 1970. */
export type Measured = {
  readonly source: string;
  readonly places: ReadonlyMap<string | null, Figures>;
  readonly now: number;
};

/** Prometheus' text format: what its node exporter's textfile collector reads. */
export const metricsOf = (
  source: string,
  places: ReadonlyMap<string | null, Figures>,
  now: number,
): string => metricsOfAll([{ source, places, now }]);

/** What metrics say whose they are; a source's own have no destination. */
function labelsOf(source: string, destination: string | null): string {
  const label = (text: string) =>
    visible(text).replace(/["\\\n]/g, (c) => (c === "\n" ? "\\n" : `\\${c}`));
  return `{source="${label(source)}"${destination === null ? "" : `,destination="${label(destination)}"`}}`;
}

/** The metrics of several runs, in which no label stands twice: the collector refuses such a file. */
export function metricsOfAll(runs: readonly Measured[]): string {
  const rows = runs.flatMap(({ source, places, now }) =>
    [...places].map(([id, place]) => ({
      labels: labelsOf(source, id),
      isSource: id === null,
      now,
      ...place,
    })),
  );
  const all = [...groupBy(rows, ({ labels }) => labels).values()].map((same) =>
    same.reduce((a, b) => ({
      ...b,
      errors: a.errors + b.errors,
      bytes: a.bytes + b.bytes,
      seconds: a.seconds + b.seconds,
      kept: b.kept ?? a.kept,
      last: b.last ?? a.last,
      free: b.free ?? a.free,
      now: Math.max(a.now, b.now),
    })),
  );
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
    metric(
      "free_bytes",
      "Bytes that were free there at the beginning, less what was sent.",
      ({ free }) => free,
    ),
    metric("last_run_timestamp_seconds", "When the last run ended.", ({ now }) => now / 1000),
  ].join("");
}

/** A drill that has ended. `source`: null where it is not known. `now`: in ms since 1970. */
export type Drilled = {
  readonly source: string | null;
  readonly destination: string;
  readonly isGood: boolean;
  readonly now: number;
};

/** The metrics of drills, by their labels. Errors: UsageError for any others in the text. */
export function parseDrills(text: string) {
  const drills = new Map<string, { last: string; success: string }>();
  for (const line of text.split("\n").filter((one) => one !== "" && !one.startsWith("#"))) {
    const [, name, labels = "", value = ""] =
      /^btrfs_backup_drill_(timestamp_seconds|success)(\{.*\}) (\d+(?:\.\d+)?)$/.exec(line) ?? [];
    if (name === undefined)
      throw new UsageError("--metrics: the file has other metrics than a drill's");
    const drilled = drills.get(labels) ?? { last: "0", success: "0" };
    drilled[name === "success" ? "success" : "last"] = value;
    drills.set(labels, drilled);
  }
  return drills;
}

/** The metrics of drills with one more. The time of the last good one of a place stays. */
export function metricsOfDrills(
  before: string,
  { source, destination, isGood, now }: Drilled,
): string {
  const drills = parseDrills(before);
  const own = labelsOf(source ?? "", destination);
  const ending = own.slice(own.indexOf('",destination=') + 1);
  const known = source !== null ? own : [...drills.keys()].find((one) => one.endsWith(ending));
  const last = isGood ? String(now / 1000) : (drills.get(known ?? own)?.last ?? "0");
  drills.set(known ?? own, { last, success: isGood ? "1" : "0" });
  const metric = (name: string, help: string, key: "last" | "success") =>
    `# HELP btrfs_backup_drill_${name} ${help}\n# TYPE btrfs_backup_drill_${name} gauge\n${[...drills].map(([labels, one]) => `btrfs_backup_drill_${name}${labels} ${one[key]}\n`).join("")}`;
  return [
    metric("timestamp_seconds", "When the last good drill ended; 0 if there was none.", "last"),
    metric("success", "Whether the last drill was good.", "success"),
  ].join("");
}

// ── 3. Hosts ─────────────────────────────────────────────────────────────────────────────

/** Where verbs run. */
export type Host = {
  readonly label: string;
  /** The ssh command that they run through; null for here. */
  readonly ssh: readonly string[] | null;
  readonly sudo: boolean;
  /** Every so many seconds a process that holds a lock there is told that we live. */
  readonly beat: number;
  readonly fence?: Fence;
  /** The process whose mount namespace verbs start in; without it, that of everybody. */
  readonly namespace?: string;
};

/**
 * The mount namespace that a verb works in, behind the fence (see PRELUDE). `try`: its own if
 * possible, for verbs that tell whether it was; `own`: its own, or none; `pid`: that of the process
 * that holds a folder.
 */
export type Fence = "try" | "own" | { readonly pid: string };

/** A constant POSIX script; its input comes as positional parameters. */
export type Verb = { readonly name: string; readonly script: string };

/**
 * A line behind which a line break is a blank, since the shell expects more; elsewhere it is a `;`.
 * The last alternative is a pattern of `case` alone.
 */
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

/**
 * A line with a character that login shells differ about (see `quote`), or a comment behind code.
 */
const UNFIT = /^(?![ \t]*#).*?(?:['\\!]|[ \t;&|(]#)/m;

/**
 * A POSIX shell script, or a piece of one, over many lines. Only other pieces may be put into it.
 * Errors: a script that would not survive a login shell, or would hide its end in one line.
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
 * The parameters of a verb by name: `name` must be given; `name?` may be left out, with all that
 * follow; `names...` are any number, and the last.
 */
type Named<S extends string> = {
  readonly [W in Words<S> as W extends `${string}?` | `${string}...` ? never : W]: string;
} & {
  readonly [W in Words<S> as W extends `${infer Name}?` ? Name : never]?: string | undefined;
} & {
  readonly [W in Words<S> as W extends `${infer Name}...` ? Name : never]: readonly string[];
};

/**
 * A declared verb: `takes` names its parameters, and `written` is its script as a person reads it.
 */
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

/** How many of a list's words are shown. */
const TYPED_WORDS = 10;

/** A verb as a person would type it: its host, its name, and each value behind its own name. */
export function typedVerb<V extends Declared>(
  { label }: Pick<Host, "label">,
  verb: V,
  given: ArgumentsOf<V>,
): string {
  const values = given as Readonly<Record<string, string | readonly string[] | undefined>>;
  const words = parametersOf(verb).flatMap(({ name }) => {
    const value = values[name] ?? "";
    if (value.length === 0) return [];
    if (typeof value === "string") return [`${name}=${shellWord(value)}`];
    const shown = value.slice(0, TYPED_WORDS).map(shellWord);
    const more = value.length > TYPED_WORDS ? ` … ${value.length} in all` : "";
    return [`${name}=(${shown.join(" ")}${more})`];
  });
  return [...(label === "" ? [] : [`${label}:`]), verb.name, ...words].join(" ");
}

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
/**
 * The name of a run's own directory: its process ID, and the namespace of processes that has this
 * ID.
 */
const OWN_DIRECTORY = /^btrfs-backup\.(\d+)\.(\d+)\.\w{6}$/;
/**
 * A directory for control sockets and the like, gone at exit. Its path is short, as a socket's must
 * be.
 */
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
      // Where a filesystem is full, directories can be made, and nothing be written.
      writeFileSync(join(made, "room"), Buffer.alloc(2 ** 16));
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

/** Removes the directories of runs that were killed. */
function clearDead(parent: string, namespace: string): void {
  for (const name of readdirSync(parent)) {
    const [, pid, other] = OWN_DIRECTORY.exec(name) ?? [];
    const isDead =
      other === namespace &&
      lstatSync(join(parent, name), { throwIfNoEntry: false })?.uid === process.getuid?.() &&
      !existsSync(`/proc/${pid}`);
    if (isDead) rmSync(join(parent, name), { recursive: true, force: true });
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
  // Of several runs, those with the same options share a connection: another one could be of
  // another key, which may do other things.
  const connection = setting().member === null ? "%C" : connectionName(name, options.sshOptions);
  // The first value of an ssh option wins: the user's stand before ours.
  const ssh = [
    ...options.sshOptions,
    "ControlMaster=auto",
    `ControlPath=${runtimeDirectory()}/${connection}`,
    "ControlPersist=no",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=2",
    "ConnectTimeout=15",
    // A user's configuration lends these to hosts to log in to. This host may be hostile.
    "ForwardAgent=no",
    "ForwardX11=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    // It may also replace our command there. An older ssh does not know all of these:
    // ssh_config(5).
    "IgnoreUnknown=RemoteCommand,ForkAfterAuthentication,SessionType,StdinNull",
    "RemoteCommand=none",
    "ForkAfterAuthentication=no",
    "SessionType=default",
    "StdinNull=no",
  ].flatMap((option) => ["-o", option]);
  const { user, name: host, port } = name;
  if (port !== null) ssh.push("-p", port);
  if (user !== null) ssh.push("-l", user);
  return {
    label: `${user === null ? "" : `${user}@`}${host}`,
    ssh: ["ssh", "-T", ...ssh, "--", host],
    sudo: options.sshSudo,
    beat,
  };
}

/** The name of a connection's socket, which is shorter than %C would be with all that is in it. */
const connectionName = (host: HostName, sshOptions: readonly string[]) =>
  digestOf(JSON.stringify([host, sshOptions])).slice(0, 32);

const LOCAL: Host = { label: "", ssh: null, sudo: false, beat: 15 };

/** A host whose verbs see its mounts as everybody does. */
const plainHost = ({ fence: _, ...host }: Host): Host => host;

const sameHost = (a: Host, b: Host) => JSON.stringify(a.ssh) === JSON.stringify(b.ssh);

/** What tells a verb's process from others, as in ps(1). */
const titleOf = ({ name }: Verb) => quote(`btrfs-backup:${name}`);

/**
 * The words that a verb's script gets. The first is its mode: "sudo" has btrfs run under it,
 * "fence" says that the mount namespace is its own.
 */
function scriptArguments({ sudo, fence }: Host, args: readonly string[]): string {
  const fenced = fence === undefined ? "" : "fence";
  return [sudo ? "sudo" : fenced, ...args].map(quote).join(" ");
}

const UNSHARE = "unshare -m --propagation slave --";
const nsenter = (pid: string) => `nsenter -t ${pid} -m --`;

/** As titleOf, for TRY. */
const TRYING = "btrfs-backup";

/**
 * Runs `sh -c SCRIPT TITLE MODE ARGUMENT...`, with the mode "try" in a mount namespace of its own
 * where root can have one.
 */
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
  const { sudo, fence, namespace } = host;
  const entering = namespace === undefined ? "" : `${nsenter(namespace)} `;
  if (fence === "try" && !sudo)
    return `${entering}sh -c ${quote(oneLine(TRY))} ${quote(TRYING)} ${quote(verb.script)} ${titleOf(verb)} ${args.map(quote).join(" ")}`;
  const text = `sh -c ${quote(verb.script)} ${titleOf(verb)} ${scriptArguments(host, args)}`;
  if (sudo || fence === undefined || fence === "try") return entering + text;
  return fence === "own" ? `${entering}${UNSHARE} ${text}` : `${nsenter(fence.pid)} ${text}`;
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

/** How to end the children when a signal ends the run; but not those that clean up. */
const running = new Set<() => void>();
let interruption: Interrupted | null = null;
let tellSignalled = () => {};
/** Comes with the first signal that ends the run. */
const signalled = new Promise<true>((come) => (tellSignalled = () => come(true)));
const cleaning = new AsyncLocalStorage<true>(); // one transfer cleans up while others go on

/**
 * Ends everything at the first signal, and gives up cleaning at the second. A signal that we were
 * started to ignore, as by nohup(1), stays ignored.
 */
export function stopOnSignals(): void {
  // A bit for each signal: proc_pid_status(5).
  const [, bits = "0"] = /^SigIgn:\s*(\w+)/m.exec(readFileSync("/proc/self/status", "utf8")) ?? [];
  const isIgnored = (signal: NodeJS.Signals) =>
    ((BigInt(`0x${bits}`) >> BigInt(osConstants.signals[signal] - 1)) & 1n) === 1n;
  // Else the kernel tells nobody how a child has ended.
  if (isIgnored("SIGCHLD")) process.on("SIGCHLD", () => {});
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const)
    if (signal === "SIGTERM" || !isIgnored(signal))
      process.on(signal, () => {
        if (interruption !== null) process.exit(statusOf(signal));
        interruption = new Interrupted(signal);
        terminal.interrupted();
        for (const stop of running) stop();
        tellSignalled();
      });
}
/** The exit status of a shell's command that a signal ended. */
const statusOf = (signal: NodeJS.Signals) => 128 + osConstants.signals[signal];
/** The exit status after a signal; 0 if there was none. */
const statusOfSignal = () => (interruption === null ? 0 : statusOf(interruption.signal));

/**
 * Lets nothing in the environment decide whose programs we run, though we enter other users'
 * directories, nor how a shell reads our scripts.
 */
function settleEnvironment(environment: Record<string, string | undefined>): void {
  const folders = (environment["PATH"] ?? "").split(":").filter((folder) => folder.startsWith("/"));
  environment["PATH"] =
    folders.join(":") || "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
  for (const name of ["SHELLOPTS", "BASHOPTS"]) delete environment[name];
}

function checkInterruption(): void {
  if (interruption !== null && !cleaning.getStore()) throw interruption;
}

/** Runs work that must still happen after a signal. */
const whileCleaning = <T>(work: () => Promise<T>): Promise<T> => cleaning.run(true, work);

/** A verb that was started: its output as it comes, its end, and the way to end it. */
type Started = { readonly process: ProcessPromise; readonly stop: () => void };

/** Where zx would keep all that a process prints: of one that is read as it comes, only errors. */
const onlyErrors = () => {
  const nothing = (): string[] => Object.assign([], { push: () => 0 });
  return { stdout: nothing(), stderr: [], stdall: nothing() };
};

function start<V extends Declared>(
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  isKept = true,
): Started {
  const args = wordsFor(verb, given);
  checkInterruption();
  log.debug(typedVerb(host, verb, given));
  const local = host.ssh === null;
  const text =
    local && host.fence === undefined && host.namespace === undefined
      ? `: ${titleOf(verb)}; set -- ${scriptArguments(host, args)}; ${verb.script}`
      : `exec ${commandFor(host, verb, args)}`;
  if (setting().scripts) log.debug(`script: ${text}`);
  // Ctrl-C reaches every child of the terminal, but we end these, after cleaning up: a verb has a
  // process group of its own. ssh stays where it can ask for a passphrase.
  const child = shell({
    stdio: ["pipe", "pipe", "pipe"],
    detached: local,
    ...(isKept ? {} : { store: onlyErrors() }),
  })`${`trap "" INT HUP; ${text}`}`;
  const pid = pidOf(child);
  child.stdin.on("error", () => {}); // gone before we were: its exit status tells
  return { process: child, stop: () => sendSignal(local ? -pid : pid, "SIGTERM") };
}

/** The ID of a process that was started. Errors: Failure where none could be. */
function pidOf(child: ProcessPromise): number {
  if (child.pid === undefined) throw new Failure(NO_PROCESS);
  return child.pid;
}

const WITHOUT_ROOT = `(see "btrfs-backup help without-root")`;

/** The errors that a verb's exit status stands for. */
const STATUS_ERRORS: Partial<Record<number, new (message: string) => Error>> = {
  64: UsageError,
  66: Absent,
  75: Busy,
  76: Taken,
  78: Unfinished,
  79: NoDirectoryAbove,
};

/** Messages of ssh where the host cannot be reached, or no more. */
const UNREACHABLE =
  /No route|timed out|Timeout, server|refused|not resolve|unreachable|Host is down|Broken pipe|mux_client|Connection .*(closed|reset)/i;

type Result = Pick<Awaited<ProcessPromise>, "exitCode" | "signal" | "stdout" | "stderr">;

/** The output of a verb that failed, with a hint where it lacks root. */
function saidBy(host: Host, { stdout, stderr }: Result): string {
  const text = stderr.trim() || stdout.trim().slice(0, 500); // nologin(8) speaks on stdout
  const isUser = host.sudo || (host.ssh === null && process.getuid?.() !== 0);
  return isUser && /Permission denied|Operation not permitted/.test(text)
    ? `${text}: this needs root, as sudo gives it ${WITHOUT_ROOT}`
    : text;
}

/** A verb's exit status other than 0 as an error that says where, what, and what it printed. */
function failureOf(host: Host, what: string, result: Result): Error {
  const { exitCode, signal } = result;
  const said = saidBy(host, result);
  // A place stands once in a message, whoever named it.
  const [place] = /^\/.*?(?=: )/.exec(said) ?? [];
  const cause = place !== undefined && what.endsWith(place) ? said.slice(place.length + 2) : said;
  const where = host.label === "" || what.includes(host.label) ? "" : `${host.label}: `;
  const message = `${where}${what}: ${cause || `ended by ${signal ?? `exit status ${exitCode}`}`}`;
  const kind = STATUS_ERRORS[exitCode ?? 0];
  if (kind === UsageError || kind === Unfinished) return new kind(said);
  if (kind !== undefined) return new kind(message);
  const isGone = host.ssh !== null && exitCode === 255 && UNREACHABLE.test(said);
  return isGone ? new Unreachable(message) : new Failure(message);
}

/** A verb to run on a host, with arguments by name; errors begin with `what`. */
type Question<V extends Declared> = [
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  what: string,
  input?: string,
];

/**
 * Runs a verb for its output. Errors: Failure, Busy (exit 75), Absent (exit 66, host not reached).
 */
const ask = async <V extends Declared>(...question: Question<V>): Promise<string> =>
  (await askAll(question)).stdout;

/** Runs a verb for its output in bytes. Errors: those of `ask`. */
const askBytes = async <V extends Declared>(...question: Question<V>): Promise<Buffer> =>
  Buffer.concat((await askAll(question)).output);

/** The verb of a hook, which may take as long as its user likes. */
const USERS_OWN = "hook";

/**
 * Runs a verb, and gives `take` its output as it comes; none of it is kept. Errors: those of `ask`
 * and of `take`, which ends it.
 */
async function askInPieces<V extends Declared>(
  question: Question<V>,
  take: (piece: Buffer) => void,
): Promise<void> {
  let problem: unknown = null;
  await askAll(question, (piece, stop) => {
    try {
      if (problem === null) take(piece);
    } catch (error) {
      problem = error;
      stop();
    }
  }).catch((error) => {
    throw error instanceof Interrupted || problem === null ? error : problem;
  });
  if (problem !== null) throw problem;
}

async function askAll<V extends Declared>(
  [host, verb, given, what, input = ""]: Question<V>,
  take?: (piece: Buffer, stop: () => void) => void,
) {
  const { process: child, stop } = start(host, verb, given, take === undefined);
  child.stdin.end(input);
  if (!cleaning.getStore()) running.add(stop);
  let bytes = 0;
  const output: Buffer[] = [];
  child.stdout.on("data", (chunk: Buffer) => {
    bytes += chunk.length;
    if (take === undefined) output.push(chunk);
    else take(chunk, stop);
  });
  const whose =
    host.ssh === null ? { group: child.pid as number } : { verb, folder: folderOf(given) };
  const worked = async () => `${bytes} ${await progressOf(host, whose)}`;
  const result = await (
    verb.name === USERS_OWN ? child : attended(child, what, worked, stop)
  ).finally(() => running.delete(stop));
  checkInterruption();
  if (result.exitCode !== 0) throw failureOf(host, what, result);
  return { stdout: result.stdout, output };
}

// ── connections that several runs share ──

/** A connection that is kept: null, or how it came to nothing, and the way to end it. */
type Connection = {
  readonly failure: Result | Silent | null;
  readonly close: () => void;
  readonly ended: Promise<unknown>;
};

/** Those of this process, by what ssh is called with. */
const connections = new Map<string, Promise<Connection>>();
/** The last one that may ask for a password: two at once would get each other's. */
let lastAsking: Promise<unknown> = Promise.resolve();

/**
 * Of several runs, waits until a host has the connection that all of them use. It is kept from one
 * run to the next, so that nobody is asked twice for a password. `what` is to be reached. Errors:
 * those of a verb that cannot reach it.
 */
async function connected(host: Host, what: string): Promise<void> {
  if (host.ssh === null || setting().member === null) return;
  const key = JSON.stringify(host.ssh);
  let connection = connections.get(key);
  if (connection === undefined) {
    const isAsking = process.stdin.isTTY || process.stderr.isTTY;
    connection = (isAsking ? lastAsking : Promise.resolve()).then(() => connect(host, key));
    connections.set(key, connection);
    lastAsking = endOf(connection, null);
  }
  const { failure } = await connection;
  checkInterruption();
  if (failure instanceof Silent)
    throw new Unreachable(`${what}: no answer within ${LIMITS.open / 1000} s`);
  if (failure !== null) throw failureOf(host, what, failure);
}

/** Connects to a host, and stays so until it is told otherwise, or this program ends. */
async function connect({ ssh }: Host, key: string): Promise<Connection> {
  checkInterruption();
  const [program = "", ...words] = ssh ?? [];
  const own = ["ControlMaster=yes", "PermitLocalCommand=yes", "LocalCommand=echo"];
  const call = [program, "-N", ...own.flatMap((option) => ["-o", option]), ...words];
  // ssh reads no input with -N: another process sees when ours is gone. Ctrl-C is for us alone,
  // since there is something to clean up over there.
  const text = [
    `trap "" INT HUP`,
    "exec 3<&0",
    `${call.map(quote).join(" ")} </dev/null 3<&- & ssh=$!`,
    "{ cat <&3; kill $ssh; } >/dev/null 2>&1 & exec 3<&-",
    "wait $ssh",
  ].join("\n");
  const child = shell({ stdio: ["pipe", "pipe", "pipe"] })`${text}`;
  pidOf(child);
  child.stdin.on("error", () => {});
  const close = () => void child.stdin.end();
  running.add(close);
  // A lost connection is made anew by whoever needs it.
  void child.then(() => (connections.delete(key), close()));
  const output = await Promise.race([
    outputUntil(child, "\n", { limit: LIMITS.open }),
    interrupting().then(() => null),
  ]);
  running.delete(close);
  if (output instanceof Silent) {
    connections.delete(key);
    close();
    return { failure: output, close, ended: child };
  }
  const isUp = output !== null && interruption === null;
  if (!isUp) close();
  return { failure: isUp ? null : await child, close, ended: child };
}

/** Ends the connections that runs have shared. */
async function disconnect(): Promise<void> {
  const all = await Promise.allSettled(connections.values());
  const up = all.flatMap((one) => (one.status === "fulfilled" ? [one.value] : []));
  for (const { close } of up) close();
  await isOverWithin(LIMITS.parting, Promise.all(up.map(({ ended }) => ended)));
}

// ── what does not end ──

/** In ms. */
const LIMITS = {
  /** How long a place that is asked to open may be silent. */
  open: 120e3,
  /**
   * How long a process may do nothing (see --timeout); six times as long while it waits for a disk
   * to have everything.
   */
  get stuck() {
    return setting().stuck;
  },
  /** How long a process that is told to end may take. On a dead disk it never does. */
  get parting() {
    return setting().parting;
  },
};

/** Comes with a signal, except for what cleans up after it. */
const interrupting = (): Promise<true> => (cleaning.getStore() ? new Promise(() => {}) : signalled);

/** Comes with the end of something, good or bad, and has `value`. */
const endOf = <T>(one: Promise<unknown>, value: T): Promise<T> =>
  one.then(
    () => value,
    () => value,
  );

/** Waits for so many ms, or until something else is over, and tells whether it is. */
async function isOverWithin(ms: number, over: Promise<unknown>): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<false>((done) => (timer = setTimeout(() => done(false), ms)));
  const first = await Promise.race([late, endOf(over, true)]);
  clearTimeout(timer);
  return first;
}

/**
 * Waits for a process as long as it does anything: `worked` tells what it has done so far. Then it
 * is stopped, and left alone if it does not end, as one that waits for a dead disk; so it is after
 * a signal. Errors: Stuck, Interrupted.
 */
async function attended<T>(
  ended: Promise<T>,
  what: string,
  worked: () => Promise<string>,
  stop: () => void,
): Promise<T> {
  const interval = Math.min(60e3, LIMITS.stuck / 4); // ms
  let [seen, idle, isAnnounced] = ["", 0, false];
  const interrupted = interrupting();
  while (!(await Promise.race([isOverWithin(interval, ended), interrupted]))) {
    const work = await Promise.race([worked(), endOf(ended, ""), endOf(interrupted, "")]);
    const isSyncing = work.includes(SYNCING);
    idle = work === seen ? idle + interval : 0;
    seen = work;
    if (isSyncing && idle > 0 && !isAnnounced) {
      log.info(`${what}: waiting for the disk to have everything (${SYNCING})`);
      isAnnounced = true;
    }
    if (idle < LIMITS.stuck * (isSyncing ? 6 : 1)) continue;
    stop();
    const isOver = await isOverWithin(LIMITS.parting, ended);
    throw new Stuck(
      `${what}: stuck: for ${idle / 1000} s no byte moved, and none of its processes did anything (--timeout)${isOver ? "" : "; they do not end: does the disk answer?"}`,
    );
  }
  if (interruption !== null && !(await isOverWithin(LIMITS.parting, ended))) checkInterruption();
  return ended;
}

/** The folder that a verb is asked to work in, if any. */
const folderOf = (given: object) => ("folder" in given ? String(given.folder) : "");

/** What WORK tells of a process that waits for a disk to have everything. */
const SYNCING = "btrfs filesystem sync";

/** Processes: those of a group here, or those of a verb in a folder on another host. */
type Workers = { readonly group: number } | { readonly verb: Verb; readonly folder: string };

/** Tells what processes have done so far; nothing where nobody can tell. */
async function progressOf(host: Host, whose: Workers): Promise<string> {
  const asked =
    "group" in whose
      ? { group: String(whose.group), verb: "", folder: "" }
      : { group: "", verb: whose.verb.name, folder: whose.folder };
  try {
    const { process: child, stop } = start(plainHost(host), PROGRESS, asked);
    child.stdin.end();
    if (await isOverWithin(30e3, child)) return (await child).stdout;
    stop();
    return "";
  } catch {
    return ""; // a signal
  }
}

/** A verb that holds something (a lock) until it is told to let go. */
type Held = { readonly output: string; readonly release: () => Promise<void> };

/** A line that a verb prints on the way, and what is done then. */
type LineSeen = { readonly line: string; readonly tell: () => void };

/**
 * How a verb is held: it prints until a line that is `end`, and may be silent for `wait` s longer
 * than LIMITS says. It waits for the line of input `first`, and is ended once it is `unwanted`.
 */
type Holding = {
  readonly end: string;
  readonly what: string;
  readonly wait?: number;
  readonly first?: Promise<string> | undefined;
  readonly unwanted?: AbortSignal | undefined;
  readonly seen?: LineSeen | undefined;
};

/**
 * Starts a verb that prints, and then waits for its input to close. Errors: those of `ask`;
 * Unreachable or Stuck where nothing comes.
 */
async function holdVerb<V extends Declared>(
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  { end, what, first, unwanted, seen, wait = 0 }: Holding,
): Promise<Held> {
  const { process: child, stop } = start(host, verb, given);
  running.add(stop);
  void first?.then((line) => child.stdin.write(`${line}\n`));
  unwanted?.addEventListener("abort", () => running.has(stop) && stop());
  // It waits for the lock of the chain, and then for those of transfers that are still being
  // received.
  const limit =
    LIMITS.stuck === Infinity ? Infinity : Math.min(LIMITS.open, LIMITS.stuck) + 4000 * wait;
  const interrupted = interrupting()
    .then(() => isOverWithin(LIMITS.parting, child))
    .then(() => null);
  const output = await Promise.race([
    outputUntil(child, `\n${end}\n`, { limit, from: first, seen }),
    interrupted,
  ]);
  running.delete(stop);
  if (output instanceof Silent) {
    stop();
    const isOver = await isOverWithin(LIMITS.parting, child);
    const message = `${what}: no answer within ${limit / 1000} s${isOver ? "" : ", and what was asked does not end: does the disk answer?"}`;
    throw host.ssh === null ? new Stuck(message) : new Unreachable(message);
  }
  const beats =
    host.ssh === null ? undefined : setInterval(() => child.stdin.write("."), host.beat * 1000);
  void child.then(() => clearInterval(beats));
  const release = async () => {
    clearInterval(beats);
    child.stdin.end();
    if (!(await isOverWithin(LIMITS.parting, lockGone(host, child)))) stop();
  };
  if (output === null) {
    checkInterruption();
    throw failureOf(host, what, await child);
  }
  if (interruption !== null) await release();
  checkInterruption();
  return { output, release };
}

/**
 * Comes when a verb whose input was closed has no lock any more. Over ssh its output ends with the
 * lock; its process can be the connection that other commands share, which ends with the last of
 * them.
 */
function lockGone({ ssh }: Host, child: ProcessPromise): Promise<unknown> {
  if (ssh === null) return child;
  if (child.stdout.readableEnded) return Promise.resolve();
  return new Promise((done) => child.stdout.once("end", done));
}

class Silent {}

/** When a verb must have printed something: within `limit` ms after `from`. */
type Patience = {
  readonly limit?: number;
  readonly from?: Promise<unknown> | undefined;
  readonly seen?: LineSeen | undefined;
};

/**
 * What a verb prints up to `end`; null if its output ends before, and Silent if nothing comes for
 * too long. The text is decoded at once: lists of subvolumes can be long.
 */
function outputUntil(
  child: ProcessPromise,
  end: string,
  { limit = Infinity, from = Promise.resolve(), seen }: Patience = {},
): Promise<string | null | Silent> {
  return new Promise((done) => {
    const output: Buffer[] = [];
    const [line, last] = [Buffer.from(`\n${seen?.line}\n`), Buffer.from(end)];
    const kept = Math.max(last.length, line.length);
    let tail: Buffer = Buffer.alloc(0);
    let tell = seen?.tell;
    let alarm: ReturnType<typeof setTimeout> | undefined;
    let heard = 0;
    let isOver = false;
    const ended = (how: string | null | Silent) => {
      isOver = true;
      clearTimeout(alarm);
      done(how);
    };
    // There can be thousands of chunks: none sets a timer.
    const listen = (rest: number) => {
      alarm = setTimeout(() => {
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
      output.push(chunk);
      if (tell !== undefined && Buffer.concat([tail, chunk]).includes(line)) {
        tell();
        tell = undefined;
      }
      tail =
        chunk.length < kept ? Buffer.concat([tail, chunk]).subarray(-kept) : chunk.subarray(-kept);
      if (tail.subarray(-last.length).equals(last)) ended(Buffer.concat(output).toString());
    });
    void child.then(() => ended(null));
  });
}

/** What the relay does with the bytes that pass it. */
type Relay = Readonly<{
  /** It tells their SHA-256. */
  sum?: boolean;
  /** It passes at most so many bytes a second. */
  rate?: number;
  /**
   * The file for what it tells at its end. Twice a second, the file with ".now" behind its name
   * gets the bytes that have passed, and the numbers of outputs that take nothing.
   */
  tell?: string;
  /** They must be this stream: see streamCheck. */
  check?: Expected;
  /**
   * They come with a guarded key: a send stream, or any bytes; at most so many, or `refusal` is
   * told. Guard is asked: see Said. `state`: the file that says whether the relay waits for its
   * input (r), or has something to pass on (w).
   */
  guarded?: {
    readonly stream: boolean;
    readonly most: number | null;
    readonly refusal: string;
    readonly state: string;
  };
  /** They go nowhere. */
  drop?: boolean;
  /**
   * Where they go instead of stdout: FIFOs, each with its reader's process group. A removed one is
   * given up.
   */
  to?: readonly { readonly path: string; readonly group: number }[];
}>;

/**
 * The stream that is expected: its subvolume, and that one's parent; `alone`: no fence keeps it in.
 * Empty UUIDs are not known.
 */
type Expected = Readonly<{
  name: string;
  uuid: string;
  parent: string | null;
  alone: boolean;
}>;

/** What the relay tells at its end. */
type Passed = { readonly bytes: number; readonly sum: string | null };

/** What a promise came to. Errors: its own. */
function resultOf<T>(settled: PromiseSettledResult<T> | undefined): T {
  if (settled?.status === "fulfilled") return settled.value;
  throw settled?.reason;
}

/** One process of a pipeline. */
export type Stage = {
  readonly label: string;
  readonly command: string;
  /** The command as a person would type it, where it is a script. */
  readonly typed?: string;
  /** The verb that works for it on another host. */
  readonly far?: { readonly host: Host; readonly verb: Verb; readonly folder: string };
  /** Its stderr goes to the terminal, not into the error. */
  readonly shown?: boolean;
  /** It is a `btrfs receive`. */
  readonly receives?: boolean;
  /** Its messages do not tell that the receiving side is full. */
  readonly sends?: boolean;
  /** It is this program, which counts better than the kernel. */
  readonly relay?: Relay;
  /** Gets the number of bytes that have passed it, and null at the end. */
  readonly counts?: (bytes: number | null) => void;
};

/** A verb on a host, with arguments by name, and what else is to be said of its stage. */
type Staging<V extends Declared> = [
  host: Host,
  verb: V,
  given: ArgumentsOf<V>,
  more?: Partial<Stage>,
];

/** A verb as a stage: `what` it does there. */
function verbStage<V extends Declared>(
  what: string,
  ...[host, verb, given, more]: Staging<V>
): Stage {
  return {
    label: `${what}${host.label === "" ? "" : ` on ${host.label}`}`,
    command: commandWith(host, verb, given),
    typed: typedVerb(host, verb, given),
    ...(host.ssh === null ? {} : { far: { host, verb, folder: folderOf(given) } }),
    ...more,
  };
}

/** Bytes with their SHA-256. */
type Summed = { readonly bytes: number; readonly sum: string };

/** What has passed a pipeline. */
type Piped = {
  /** Null where the kernel does not count them. */
  readonly bytes: number | null;
  /** What went to its end, if that was asked for. */
  readonly summed: Summed | null;
};

/** The relay as a stage. */
const relayStage = (how: Relay, counts?: Stage["counts"]): Stage => ({
  label: "relay",
  command: "",
  relay: how,
  ...(counts === undefined ? {} : { counts }),
});

/** Joins relays that stand side by side into one. */
function withoutTwins(stages: readonly Stage[]): Stage[] {
  const all: Stage[] = [];
  for (const stage of stages) {
    const last = all.at(-1);
    if (stage.relay === undefined || last?.relay === undefined) all.push(stage);
    else all[all.length - 1] = { ...last, ...stage, relay: { ...last.relay, ...stage.relay } };
  }
  return all;
}

/** The words that start this program once more. */
const OURSELVES = ((): readonly string[] => {
  // Where the kernel cannot start our own executable: under qemu-user.
  const emulated = process.env["BTRFS_BACKUP_RELAY"];
  if (emulated !== undefined) return emulated.split(" ");
  const file = fileURLToPath(import.meta.url);
  if (file.startsWith("/$bunfs/")) return [process.execPath];
  return [
    process.execPath,
    ...(process.versions["deno"] === undefined ? process.execArgv : ["run", "-A", "--quiet"]),
    file,
  ];
})();

/** All pipelines of some work are killed when its signal comes. */
const calledOff = new AsyncLocalStorage<AbortSignal>();

/** The dealings of a pipeline with others. */
type Joint = {
  /** The file that it reads. */
  readonly input?: string;
  /** Process groups that its last stage feeds. They are killed before it ends badly. */
  readonly feeds?: readonly number[];
  /** Whether it waits for others just now, and is not to blame for what it does not do. */
  readonly waits?: () => boolean;
};

/** A pipeline at work. */
type RunningPipeline = {
  readonly group: number;
  readonly kill: () => void;
  /** The outputs of its last relay that take nothing just now, by number. */
  readonly blocked: () => readonly number[];
  readonly ended: Promise<Piped>;
};

/**
 * Runs stages as one pipeline in a process group of its own; returns the bytes that the first one
 * wrote, or the first relay passed. If a stage fails, the stages after it are killed before their
 * input closes: the failing one's shell holds the pipe until the group is dead. By SIGKILL: a
 * process that catches another signal could still take the end of a dying neighbour's output for
 * the end of the stream. Errors: Failure naming the stage that failed first, NoSpace, Stuck,
 * Interrupted.
 */
export const pipeline = async (
  stages: readonly Stage[],
  environment: Record<string, string> = {},
) => startPipeline(stages, environment).ended;

function startPipeline(
  given: readonly Stage[],
  environment: Record<string, string>,
  joint: Joint = {},
): RunningPipeline {
  checkInterruption();
  const called = calledOff.getStore();
  called?.throwIfAborted();
  const { input = "/dev/null", feeds = [], waits = () => false } = joint;
  const stages = withoutTwins(given);
  const directory = mkdtempSync(join(runtimeDirectory(), "p"));
  const text = pipelineText(stages, directory, feeds);
  log.debug(`pipeline: ${typedPipeline(stages, setting().scripts)}`);
  const child = shell({
    detached: true,
    stdio: ["ignore", "ignore", "pipe"],
    env: { ...process.env, ...environment },
  })`${`exec 3>&2 <${quote(input)}; ${text}`}`;
  const group = pidOf(child);
  const said = new TextDecoder();
  child.stderr.on("data", (chunk: Buffer) =>
    terminal.write(visible(said.decode(chunk, { stream: true }))),
  );
  /** The bytes that have passed a relay so far, and its outputs that take nothing now. */
  const toldNow = (i: number) => readIfThere(`${directory}/told.${i}.now`).split(" ").map(Number);
  const tellCounts = () => stages.forEach(({ counts }, i) => counts?.(toldNow(i)[0] as number));
  const watch = setInterval(tellCounts, 500);
  const kill = () => sendSignal(-group, "SIGKILL");
  running.add(kill);
  called?.addEventListener("abort", kill);
  let waited = 0;
  const worked = async () => {
    const elsewhere = await Promise.all(
      stages.flatMap(({ far }) => (far === undefined ? [] : [progressOf(far.host, far)])),
    );
    const passed = stages.flatMap(({ relay: by }, i) => (by === undefined ? [] : [toldNow(i)[0]]));
    if (waits()) waited++;
    return [waited, ...passed, await progressOf(LOCAL, { group }), ...elsewhere].join("\n");
  };
  const what = stages.map(({ label }) => label).join(" | ");
  const ended = attended(child, what, worked, kill).finally(() => {
    running.delete(kill);
    called?.removeEventListener("abort", kill);
    clearInterval(watch);
    tellCounts();
    for (const { counts } of stages) counts?.(null);
  });
  return {
    group,
    kill,
    blocked: () => toldNow(stages.length - 1).slice(1),
    ended: ended.then(() => outcomeOf(stages, directory, kill)),
  };
}

/** A pipeline's stages as a person would type them; with `scripts`, as they run. */
const typedPipeline = (stages: readonly Stage[], scripts: boolean) =>
  stages
    .map(({ relay: by, command, typed = command }) => {
      if (by !== undefined) return `relay ${JSON.stringify(by)}`;
      return scripts ? command : typed;
    })
    .join(" | ");

/**
 * The shell text of a pipeline, whose stages leave their stderr in files named by their numbers. A
 * stage that fails kills the process groups in `feeds`, and then the pipeline.
 */
function pipelineText(
  stages: readonly Stage[],
  directory: string,
  feeds: readonly number[],
): string {
  const file = (name: string | number) => quote(`${directory}/${name}`);
  // A child's I/O is added to its parent's when it is waited for: proc(5), /proc/pid/io. A few
  // bytes of the verb's own are in it.
  const measure = `while read -r k v; do case $k in wchar:) echo "$v" >${file("bytes")};; esac; done </proc/self/io; `;
  const end = [...feeds.map((group) => -group), 0].map((to) => `kill -KILL ${to};`).join(" ");
  const texts = stages.map(({ relay: by, ...stage }, i) => {
    const runs =
      by === undefined
        ? stage.command
        : [...OURSELVES, RELAY, JSON.stringify({ ...by, tell: `${directory}/told.${i}` })]
            .map(quote)
            .join(" ");
    const last = i === stages.length - 1 ? " >&2" : "";
    return `{ { ${runs}${last} 3>&-; } 2>${stage.shown ? "&3" : file(i)}; r=$?; ${i === 0 ? measure : ""}echo "${i} $r" >>${file("ended")}; [ $r = 0 ] || { ${end} }; }`;
  });
  return texts.join(" | ");
}

/**
 * What `btrfs receive` says where a file that a difference goes on from is not there, or not what
 * it should be; not where the name of the whole is taken.
 */
const BAD_PARENT =
  /^ERROR: (?!creating |cannot find ).*: (?:No such file or directory|File exists|Not a directory|Invalid argument)$/m;

/** The text of a file; nothing if it is not there. */
function readIfThere(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
}

/** A stage that ended, by number; -1 is the pipeline's shell, which was killed. */
type Ended = { readonly stage: number; readonly status: number };

/** What has become of a pipeline, by the files that its stages left in a directory. */
function outcomeOf(stages: readonly Stage[], directory: string, kill: () => void): Piped {
  const read = (name: string | number) => readIfThere(`${directory}/${name}`).trim();
  const ended = [...read("ended").matchAll(/^(\d+) (\d+)$/gm)].map(([, stage, status]): Ended => ({
    stage: Number(stage),
    status: Number(status),
  }));
  const errors = stages.map((_, i) => read(i));
  const written = read("bytes");
  const passed = stages
    .map((_, i) => read(`told.${i}`))
    .filter(Boolean)
    .map((said) => JSON.parse(said) as Passed);
  rmSync(directory, { recursive: true, force: true });
  checkInterruption();
  const isKilled = ended.length < stages.length; // the shell was, and not by a stage
  if (isKilled) kill();
  const failed = ended.find(({ status }) => status !== 0);
  if (failed !== undefined || isKilled)
    throw brokenBy(failed ?? { stage: -1, status: 0 }, stages, errors);
  errors.forEach((text, i) => text && log.debug(`${stages[i]?.label}: ${text}`));
  const last = passed.findLast(({ sum }) => sum !== null);
  return {
    bytes: passed[0]?.bytes ?? (written === "" ? null : Number(written)),
    summed: last === undefined ? null : { bytes: last.bytes, sum: last.sum as string },
  };
}

/** A pipeline's failure, by the stage that failed first and the stderr of each. */
function brokenBy(culprit: Ended, stages: readonly Stage[], errors: readonly string[]): Failure {
  const stage = stages[culprit.stage];
  const said = errors[culprit.stage] ?? "";
  // The others mostly say that a pipe broke, but "mostly" is not enough to hide their messages.
  const others = errors.map((text, i) =>
    text === "" || i === culprit.stage ? "" : `(${stages[i]?.label}: ${text})`,
  );
  const texts = [said, ...others].filter(Boolean);
  const { how, kind } = endingOf(culprit);
  const name = stage?.label ?? "the shell of the pipeline";
  const message = `${name} ${how}${texts.length > 0 ? `: ${texts.join(" ")}` : ""}`;
  const onReceiving = errors.filter((_, i) => !stages[i]?.sends).join("\n");
  if (/No space left on device|quota exceeded/i.test(onReceiving)) return new NoSpace(message);
  if (culprit.status === 1 && stage?.receives && BAD_PARENT.test(said))
    return new BadParent(message);
  return new kind(message);
}

/** How a stage ended, and the error that this is by itself. */
function endingOf({ stage, status }: Ended) {
  if (stage === -1) return { how: "was killed", kind: Killed };
  if (status === 255) return { how: "failed: the connection is lost", kind: Unreachable };
  if (status > 128)
    return {
      how: `was killed by signal ${status - 128}`,
      kind: status === 137 ? Killed : Failure,
    };
  const hint = status === 75 ? " (an earlier transfer may still be at work)" : "";
  return {
    how: `failed with exit status ${status}${hint}`,
    kind: status === 77 ? OtherStream : Failure,
  };
}

/** Signals a process, or a group by its negative number. */
function sendSignal(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {
    // it has ended already
  }
}

// ── 4. Btrfs ─────────────────────────────────────────────────────────────────────────────
// The verbs: constant POSIX scripts that get their values as parameters, what they print, and
// the send stream. A verb is declared once, with the names of its parameters in their order on
// the wire; its script, its callers, and guard know them by these names.
//
// btrfs alone runs under sudo, never flock, which would run anything. Exit statuses: 64 usage,
// 65 refused, 66 absent, 69 a program is missing, 75 a lock is busy, 76 the name is taken, 77
// another stream. A `folder` comes with the `fsid` that it had when it was opened, and the
// process that holds it locked: hours may have passed, and another disk may be mounted there.

/** What statfs(2) calls btrfs, in hexadecimal: linux/magic.h. */
const BTRFS_MAGIC = "9123683e";

// ── pieces that verbs share ──

/**
 * The beginning of every verb. A process costs more than a millisecond: a shell does itself what it
 * can. `b` is btrfs; `user_id` sets $user to the effective user's ID; `root` tells whether btrfs
 * has root's rights; `line` prints its parameter (echo expands backslashes in dash); `at FOLDER
 * FSID` enters a folder that was opened before, unless another filesystem or directory is there by
 * now, and behind the fence if the verb has its own mount namespace. $here is the folder's true
 * path then.
 *
 * The fence: whoever can write in a folder can put a link or a device under any name there, at any
 * moment. So root works below a bind of the root of the folder's mount (below a bind of the plain
 * folder, incremental receives fail) on which the kernel follows no links and opens no devices. The
 * bind is private, so that mounts elsewhere stay out. The other mounts are slaves, so that disks
 * that are unmounted meanwhile are free. mount(8) accepts options that it does not know: mountinfo
 * says which are in force, proc(5).
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
  # go DIRECTORY: enters it. Shells differ in their messages, and not all tell the cause.
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

  # safe OWNER MODE: whether only root and we can change a directory, as stat(1) shows it. In a
  # sticky one nobody can replace our files.
  safe() {
    user_id
    case "$1 $2" in
      "0 "d????????[tT]|"$user "d????????[tT]) ;;
      "0 "d????-??-?|"$user "d????-??-?) ;;
      *) return 1;;
    esac
  }
  # ours: whether only root and we can give the names on the way from the root of the mount to other
  # subvolumes. btrfs send, delete and show resolve paths themselves (getcwd(3), realpath(3)), and
  # read links, which no mount can forbid.
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
    # A sticky directory is ours alone for what belongs to us; the top of a snapshot belongs to its
    # owner.
    { stat -c "%u %A" -- "$@" || echo "one of them is gone"; } | while read -r owner permissions; do
      case $permissions in d????????[tT]) return 1;; esac
      safe "$owner" "$permissions" || return 1
    done
  }

  # delete_ids ID...: deletes subvolumes of this filesystem, whatever their names are, with a
  # process for each. btrfs wants a subvolume to begin from, as the root of a mount is.
  delete_ids() {
    for id; do
      case $PWD in
        /proc/fs*) b subvolume delete -i "$id" /proc/fs;;
        *) b subvolume delete -i "$id" /sys/class;;
      esac
    done
  }
  # delete_one PATH [any]: deletes the subvolume that is there now, if it is writable or "any",
  # whatever gets its name meanwhile.
  delete_one() {
    if [ "$mode" = fence ]; then
      # In it, every command speaks of the same one. In a plain directory, btrfs would tell of the
      # subvolume around it.
      id=$(cd "$1" && [ "$(stat -c %i .)" = 256 ] && { [ "$2" = any ] || [ "$(b property get -ts . ro)" = ro=false ]; } && b inspect-internal rootid .) ||
        { line "$1 is not what was to be deleted" >&2; exit 65; }
      delete_ids "$id"
    else
      b subvolume delete "$1"
    fi
  }

  # into FILE [CONVERSION]: standard input becomes a new file. No link, device or FIFO that others
  # put in its place is opened. The dd of busybox cannot do so, and has read nothing then: there the
  # shell refuses an existing file, and the fence the rest.
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

  # opened FILE: opens a plain file as descriptor 6; where possible for writing, too, since a FIFO
  # in its place would keep a reader waiting.
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

  # fenced SPOT: whether the bind there has all options, and leads to the directory of descriptor 6,
  # which it enters.
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

  # fence: goes behind it, in the current directory $here. It binds over a directory of proc or sys:
  # nobody has data there.
  spots=
  fence() {
    exec 6<.
    mount_id
    on=$mount
    # As long as we are at work, the folder's mount is busy for everybody. A directory alone can be
    # entered.
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
    # Behind the FSID stands the process that holds the folder locked, and is in it; or is above it,
    # by the path that stands behind the process.
    held=\${2#*/}
    below=
    case $held in
      */*) below=/\${held#*/}; held=\${held%%/*};;
    esac
    set -- "$1" "\${2%%/*}" "/proc/$held"
    if [ "$mode" = fence ] && [ /proc/self/ns/mnt -ef "$3/ns/mnt" ]; then
      cd -P -- "$3/cwd"
      above=\${here%"$below"}
      [ . -ef "\${above:-/}" ] || { line "$elsewhere" >&2; exit 66; }
      if [ -n "$below" ]; then
        cd -P -- ".$below" && [ . -ef "$here" ] || { line "$elsewhere" >&2; exit 66; }
      fi
      return
    fi
    cd -P -- "$1" || { echo "(is the disk mounted?)" >&2; exit 66; }
    [ "$PWD" = "$1" ] && { [ . -ef "$3/cwd" ] || [ "$(stat -f -c %i .)" = "$2" ]; } || { line "$elsewhere" >&2; exit 66; }
    if [ "$mode" = fence ]; then fence || { line "$here: $no_fence" >&2; exit 1; }; fi
  }`;

const declared: Declared[] = [];
/** Every verb that there is. */
export const VERBS: readonly Declared[] = declared;

/**
 * Declares a verb by the script that follows. It finds the parameters under their names, and those
 * of `names...` as "$@".
 */
const defineVerb =
  <const S extends string>(name: string, takes: S, prelude = PRELUDE) =>
  (...script: Parameters<typeof sh>): Declared<S> => {
    const parameters = parametersOf({ takes });
    const single = parameters.filter(({ kind }) => kind !== "...");
    const named = single.map((one, i) => `${one.name}=${i < 9 ? `$${i + 1}` : `\${${i + 1}}`}`);
    const shifted = single.length < parameters.length ? `shift ${single.length}` : "";
    const written = `${prelude}\n${named.join(" ")}\n${shifted}\n${sh(...script)}`;
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
  };

/**
 * enter PATH: a directory by its path as it was given, behind the fence where possible ($fenced
 * says so). Else $strange is the first directory on the way that others than root and we can
 * change. A symbolic link is followed until there is such a directory: whoever can change a
 * directory above the link decides where it leads.
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

/**
 * keep SECONDS: until the input closes, or is silent for so long: a dead link tells the other side
 * nothing.
 */
const KEEP = sh`
  keep() {
    if [ -n "$1" ] && command -v timeout >/dev/null; then
      while [ -n "$(timeout "$1" dd bs=1 count=1 2>/dev/null 8<&- 9<&-)" ]; do :; done
    else
      exec cat >/dev/null
    fi
  }`;

/** For `keep`: how many seconds a host waits for our next beat. */
const secondsOfSilence = (host: Host) => (host.ssh === null ? "" : String(4 * host.beat));

/**
 * watch PID: ends this process group with that process, which holds our lock over the same link.
 */
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
 * What processes have done so far, a line each: those of `group`, or of the groups in which `verb`
 * works in `folder`. Not told are processes that only wait, or pass on what others make: what waits
 * for a holder's end, and ssh, which also talks without data. See proc(5): stat, io.
 */
const PROGRESS = defineVerb("work", "group verb folder")`
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
`;

/**
 * record HEADER KEY VALUE [BEGINNING]: replaces one line of the record in the current directory,
 * whole or not at all. With a BEGINNING, only that is taken out of the line as it is by now.
 * Written and synced by dd, which tells the cause of an error; dash knows only "I/O error".
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

/**
 * receiving PREFIX SECONDS: this process alone writes to the chain from here on. Opened for
 * reading: a disk may be mounted so.
 */
const RECEIVING = sh`
  receiving() {
    make ".btrfs-backup.$1.receiving" || :
    opened ".btrfs-backup.$1.receiving"
    exec 8<&6 6<&-
    flock -w "$2" 8 || { line "an earlier transfer is still being received in $here" >&2; exit 75; }
  }`;

/**
 * sha256: prints the SHA-256 of standard input as sha256sum does, which takes three times as long
 * as openssl (coreutils 9.1).
 */
const SUMMING = sh`
  sha256() {
    if command -v openssl >/dev/null; then openssl dgst -sha256 -r | sed "s/ .*/  -/"; else sha256sum; fi
  }`;

/**
 * own_file FILE: whether only root and we can have written it. `is_complete FILE SUM BYTES KEPT`:
 * whether a file has so many bytes, and those behind the KEPT ones have that SHA-256.
 */
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
 * Prints all that there is to know of a folder (and of the SOURCE whose snapshot folder it is), in
 * sections that begin with a NONCE no listing can contain: see parseInspection. `kind` is `streams`
 * for a folder of stored streams, and `known` where the protocol need not be asked for. `wait` is
 * `look`, or the seconds to wait for the lock, which is then held until the input closes; or
 * `later`: one of these comes as a line of input.
 */
const OPEN = defineVerb("open", "nonce wait folder prefix source kind silence")`
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
  # Enter the folder, or the one above it if it is missing. "$@" are our own files in it, which must
  # be plain ones.
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
  # After the first step into the folder, which may mount it. The inode of a filesystem there is a
  # new one with each mount.
  say boot; read -r boot </proc/sys/kernel/random/boot_id; line "$boot"
  say filesystems; stat -c "%i %n" /sys/fs/btrfs/*-* 2>/dev/null || :
  say fence; line "$fenced"
  say strange; line "$strange"

  # One process for each kind of question. Of files only the owner counts.
  say user; user_id; line "$user"
  say inodes; stat -c "%i %u %A" \${source:+"$source"} . "$@"
  places=$(stat -f -c "%i %t %a %S %b" \${source:+"$source"} .)
  say places; echo "$places"
  # shellcheck disable=SC2086 # five words a line, and those of SOURCE come first
  set -- $places
  [ $# = 5 ] || shift 5
  btrfs=
  if [ "$kind" = streams ]; then :; elif [ "$2" = ${BTRFS_MAGIC} ]; then btrfs=btrfs; fi

  # All that can change while others have the lock is read behind this. The other .receiving locks
  # are those of commands, and of remotes of rclone. A folder without a lock file is not locked:
  # nothing is written before it is known to be ours.
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
`;

/**
 * Makes the folder (its last component only) and the chain's lock file; another first run may be
 * faster.
 */
const CREATE = defineVerb("create", "folder fsid prefix")`
  above=\${folder%/*}
  if [ -d "$folder" ]; then
    :
  else
    at "\${above:-/}" "$fsid"
    mkdir "./\${folder##*/}" || [ -d "./\${folder##*/}" ]
  fi
  at "$folder" "$fsid"
  make ".btrfs-backup.$prefix.lock"
`;

/**
 * Prints of folders below a place that was opened (`paths`, each with ./ before it) what OPEN prints
 * of one folder, in sections that begin with NONCE: see parseMembers. A folder is `linked` where its
 * lock file is that of the place, which is locked then; `new` where it has none; `own` where it has
 * another one, or anything else that OPEN has to look at by itself.
 */
const MEMBERS = defineVerb("members", "nonce folder fsid prefix kind paths...")`
  at "$folder" "$fsid"
  say() { echo; line "$nonce $1"; }
  lock=.btrfs-backup.$prefix.lock
  root=$PWD
  # One process for each kind of question.
  say fsids; stat -f -c "%i %n" -- "$@" 2>/dev/null || :
  for path; do set -- "$@" "$path/.btrfs-backup.json"; done
  say inodes; stat -c "%i %u %A %n" -- "$@" 2>/dev/null || :
  # IFS is a line break.
  IFS=$(echo; echo x)
  IFS=\${IFS%x}
  for path; do
    if [ -d "$path" ] && cd -P -- "$path" 2>/dev/null; then
      say member; line "$path"
      state=new
      for file in "$lock" ".btrfs-backup.$prefix.receiving" .btrfs-backup.json; do
        if [ -L "$file" ]; then state=own
        elif [ -f "$file" ]; then :
        elif [ -e "$file" ]; then state=own
        fi
      done
      if [ -e .outstanding_transfers ] || [ -L .outstanding_transfers ]; then
        state=own
      elif [ "$state" = own ]; then
        :
      elif [ "$lock" -ef "$root/$lock" ]; then
        state=linked
      elif [ -f "$lock" ]; then
        state=own
      fi
      say state; line "$state"
      if [ "$state" = own ]; then cd -P -- "$root"; continue; fi
      set -- .* *
      say entries; printf %s "$*"; echo
      say record
      if [ -f .btrfs-backup.json ]; then
        opened .btrfs-backup.json
        cat <&6
      fi
      if [ "$kind" = streams ]; then
        say files; find . -mindepth 1 -maxdepth 1 -type f -exec stat -c "%s/%Y %n" {} +
      fi
      cd -P -- "$root"
    fi
  done
  echo; echo "$nonce end"
`;

/**
 * Makes folders below a place, with the place's own lock file: who locks one of them has locked all.
 * Prints a line for each: whether its lock file is the place's (`linked`; where no other name for a
 * file can be had it is its `own`) and its inode, or `failed` and why.
 */
const JOIN = defineVerb("join", "folder fsid prefix paths...")`
  at "$folder" "$fsid"
  lock=.btrfs-backup.$prefix.lock
  for path; do
    if said=$(mkdir -p -- "$path" 2>&1) && inode=$(stat -c %i -- "$path" 2>&1); then
      :
    else
      line "failed \${said##*: }"
      continue
    fi
    if [ -e "$path/$lock" ] || [ -L "$path/$lock" ]; then
      :
    elif ln -- "$lock" "$path/$lock" 2>/dev/null; then
      :
    else
      (cd -P -- "$path" && make "$lock")
    fi
    if [ "$path/$lock" -ef "$lock" ]; then line "linked $inode"; else line "own $inode"; fi
  done
`;

/**
 * Makes the missing directories above `folder`, and prints the first, where that cannot be a disk
 * that is not mounted: the existing ones lie on a btrfs that is neither that of `source`, a path on
 * the same host, nor the root filesystem. `how`: "look" makes nothing. Else it exits with 66.
 */
const PARENTS = defineVerb("parents", "folder source how")`
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
`;

/**
 * Prints how much is free: blocks, their size, and how many there are, and the IDs of the deleted
 * subvolumes that are still there. `cleaned`: what was deleted is gone before, but for the IDs of
 * `staying`. A subvolume in which somebody has a file open does not go: when no space has become free
 * for `patience` seconds, no more is waited. Space is told as free by btrfs when a transaction has
 * ended.
 */
const FREE = defineVerb("free", "folder fsid cleaned patience staying")`
  # deleted: sets left to the IDs of the deleted subvolumes that are still there, but for those of staying.
  deleted() {
    listed=$(b subvolume list -d .)
    left=
    before=
    for word in $listed; do
      if [ "$before" = ID ]; then
        case " $staying " in
          *" $word "*) ;;
          *) left="$left $word";;
        esac
      fi
      before=$word
    done
  }
  at "$folder" "$fsid"
  left=
  if [ "$cleaned" = subvolumes ]; then
    b filesystem sync . >&2
    most=-1
    deleted
    while [ -n "$left" ]; do
      free=$(stat -f -c %a .)
      now=$(date +%s)
      if [ "$free" -gt "$most" ]; then most=$free since=$now; fi
      [ "$((now - since))" -lt "$patience" ] || break
      sleep 0.2 2>/dev/null || sleep 1
      deleted
    done
  fi
  [ -z "$cleaned" ] || sync -f . 2>/dev/null || sync
  line "$(stat -f -c "%a %S %b" .)$left"
`;

/** Replaces one line of the record: see RECORD. `sync`: once everything else is on the disk. */
const WRITE_RECORD = defineVerb("record", "folder fsid header key value sync?")`
  ${RECORD}
  at "$folder" "$fsid"
  [ "$sync" = "" ] || b filesystem sync . >&2
  record "$header" "$key" "$value"
  [ "$sync" = "" ] || sync .
`;

/**
 * Standard input becomes a file that everybody may read. Nobody reads half of it, and after a power
 * cut it has its old or its new contents.
 */
const METRICS = defineVerb("metrics", "file")`
  temporary=
  gone() { [ -z "$temporary" ] || rm -f "$temporary"; }
  trap gone EXIT
  temporary=$(mktemp "\${file%/*}/.\${file##*/}.XXXXXX")
  cat >"$temporary"
  sync "$temporary" 2>/dev/null || sync
  chmod 644 "$temporary"
  mv -T -f -- "$temporary" "$file"
  temporary=
`;

/**
 * Prints what this host's backups can be started and told by, in sections that begin with NONCE:
 * mounts, disks that can be taken away, what is installed; and for each of `places` where it, or
 * what is there of the way to it, really is.
 */
const SURVEY = defineVerb("survey", "nonce places...")`
  say() { line "$nonce $1"; }
  say mounts; cat /proc/self/mountinfo
  say fstab; if [ -r /etc/fstab ]; then cat /etc/fstab; echo; fi

  # A disk on USB, or one that says so itself. Below a mapped device stand those that it is made of.
  removable() {
    name=$(readlink -f "$1")
    name=/sys/class/block/\${name##*/}
    for node in "$name" "$name"/slaves/* "$name"/slaves/*/slaves/*; do
      node=$(readlink -f "$node") || continue
      case $node in */usb[0-9]*) return 0;; esac
      for file in "$node/removable" "\${node%/*}/removable"; do
        if [ -f "$file" ] && read -r answer <"$file" && [ "$answer" = 1 ]; then return 0; fi
      done
    done
    return 1
  }
  say removable
  sed "s/.* - [^ ]* //; s/ .*//" /proc/self/mountinfo | grep "^/dev/" | sort -u | while read -r device; do
    if removable "$device"; then line "$device"; fi
  done

  say places
  for place; do
    until [ -d "$place/" ]; do place=\${place%/*}; done
    (cd -P -- "$place/" 2>/dev/null && line "$PWD") || echo
  done
  say systemd; if [ -d /run/systemd/system ]; then echo yes; fi
  say units
  for directory in /etc /run /usr/local/lib /usr/lib /lib; do
    for file in btrfs-backup@.service btrfs-backup@.timer btrfs-backup.service btrfs-backup.timer; do
      if [ -f "$directory/systemd/system/$file" ]; then line "$directory/systemd/system/$file"; fi
    done
  done
  # One timer for all argument files is at work, or would run no other file than ours.
  say forall
  if [ -L /etc/systemd/system/timers.target.wants/btrfs-backup.timer ]; then echo enabled; fi
  say files
  for file in /etc/btrfs-backup/*.args; do
    if [ -s "$file" ]; then line "$file"; fi
  done
  say exporter
  for directory in /var/lib/prometheus/node-exporter /var/lib/node_exporter/textfile_collector /var/lib/node_exporter; do
    if [ -d "$directory" ]; then line "$directory"; fi
  done
  say program; command -v btrfs-backup || :
  say end
`;

/**
 * Prints of each of `places`, and of the usual ones: inode, filesystem, free and all blocks, their
 * size, path.
 */
const LOOK_AROUND = defineVerb("around", "places...")`
  newline=$(echo; echo x)
  newline=\${newline%x}
  for place in "$@" / /home /home/* /root /srv /srv/* /opt /usr/local /var /var/* /var/lib/*; do
    case $place in *"$newline"*) continue;; esac
    if [ -L "$place" ]; then continue; fi
    if [ -d "$place" ]; then
      line "$(stat -c %i -- "$place" 2>/dev/null) $(stat -f -c "%t %a %b %S" -- "$place" 2>/dev/null) $place"
    fi
  done
`;

/**
 * Standard input becomes a new file for root alone. Whoever could put another one in its place would
 * have root run commands (--before-snapshot). It exits with 76 where that name is taken.
 */
const WRITE_ARGUMENTS = defineVerb("arguments", "directory file")`
  ${ENTER}
  above=$directory
  until [ -d "$above/" ]; do above=\${above%/*}; done
  user_id
  walk "$above"
  if [ -n "$strange" ]; then line "others can change $strange, and so what root runs" >&2; exit 65; fi
  [ -d "$directory" ] || mkdir -p "$directory"
  enter "$directory"
  taken() { if [ -e "./$file" ] || [ -L "./$file" ]; then line "it exists" >&2; exit 76; fi; }
  taken
  new="./.$file.$$"
  made=
  gone() { [ -z "$made" ] || rm -f -- "$new"; }
  trap gone EXIT
  into "$new" fsync
  made=yes
  ln -T -- "$new" "./$file" || { taken; exit 1; }
  sync . 2>/dev/null || sync
`;

/** Starts a timer, now and at each boot. */
const ENABLE = defineVerb("enable", "unit")`
  systemctl enable --now -- "$unit" >&2
`;

/** Moves a record out of the way. */
const ASIDE = defineVerb("aside", "folder fsid suffix")`
  at "$folder" "$fsid"
  mv -T -f .btrfs-backup.json ".btrfs-backup.json.$suffix"
`;

/** Prints facts of the top level that the list of subvolumes lacks. */
const SHOW = defineVerb("show", "folder fsid")`
  at "$folder" "$fsid"
  b subvolume show .
`;

/** Tells a host's kernel, and the versions of those programs that are there. */
const TOOLS = defineVerb("tools", "programs...")`
  read -r release </proc/sys/kernel/osrelease
  line "Linux $release"
  for program; do
    if command -v "$program" >/dev/null; then
      said=$("$program" --version 2>&1 | head -n 1) || :
      line "$program $said"
    fi
  done
`;

/**
 * The processes that have a chain's locks open, which is to hold them or to wait for them. Who only
 * looks takes no lock, and what flock(1) has locked for its shell has no living owner in
 * /proc/locks.
 */
const AT_WORK = defineVerb("at-work", "folder fsid prefix")`
  at "$folder" "$fsid"
  # A link is looked behind only where its name is ours: a dead mount would keep us. The find of
  # busybox does not tell where links lead.
  # shellcheck disable=SC2012
  ls -l /proc/[0-9]*/fd 2>/dev/null | while read -r found; do
    case $found in
      /proc/*/fd:) process=\${found%/fd:}; continue;;
      *" -> "*/.btrfs-backup.*) ;;
      *) continue;;
    esac
    number=\${found%% -> *}
    open=$process/fd/\${number##* }
    if [ "$open" -ef ".btrfs-backup.$prefix.lock" ] || [ "$open" -ef ".btrfs-backup.$prefix.receiving" ]; then
      line "\${process#/proc/}"
    fi
  done
`;

/** The block devices below a btrfs, or below any other filesystem's device, a line each. */
const DISKS = defineVerb("disks", "filesystem device")`
  set --
  for found in \${filesystem:+"/sys/fs/btrfs/$filesystem/devices/"*}; do
    set -- "$@" "/dev/\${found##*/}"
  done
  if [ $# = 0 ]; then set -- "$device"; fi
  below() { lsblk -n -s -l -o KNAME -- "$@" 2>/dev/null || :; }
  below "$@" | while read -r name; do
    line "$name"
    # lsblk does not tell what a loop device reads from.
    if [ -f "/sys/block/$name/loop/backing_file" ]; then
      read -r file <"/sys/block/$name/loop/backing_file"
      case $file in /dev/*) below "$file";; esac
    fi
  done
`;

/** Timers and services of systemd whose names begin so, and files of cron that have the name. */
const TIMERS = defineVerb("timers", "name")`
  systemctl show --property=Id,ActiveState,LastTriggerUSec,Result "$name*.timer" "$name*.service" 2>/dev/null || :
  echo
  echo cron
  grep -ls -e "^[^#]*$name" /etc/crontab /etc/anacrontab /etc/cron.*/* /var/spool/cron/* /var/spool/cron/crontabs/* 2>/dev/null || :
`;

// ── snapshots, and the way that they go ──

/** Gives a snapshot another name, in the same folder. */
const RENAME = defineVerb("rename", "folder fsid name to")`
  at "$folder" "$fsid"
  if [ -e "./$to" ] || [ -L "./$to" ]; then line "$here/$to is there" >&2; exit 76; fi
  mv -T "./$name" "./$to"
`;

/**
 * The user's own command, before or after a snapshot, in the user's own environment. Processes that
 * it leaves behind must not keep us waiting for our pipes.
 */
const HOOK = defineVerb(USERS_OWN, "command", "shift")`
  output=$(mktemp) || output=
  exec 3>"\${output:-/dev/null}"
  exec 4<"\${output:-/dev/null}"
  # It has no name any more: whatever ends this, nothing is left.
  if [ -n "$output" ]; then rm -f "$output"; fi
  sh -c "$command" >&3 2>&1 </dev/null 3>&- 4<&- && result=0 || result=$?
  cat <&4 >&2
  [ "$result" = 0 ] || { echo "(exit status $result)" >&2; exit 1; }
`;

/**
 * Takes the snapshot `name`. Prints `subvolume show` of it; only the ID if we are not root. The
 * kernel commits the transaction. Where others can put something else in the place of `source`, it
 * must have the `uuid`: what is named can change, and the current directory stays the same.
 */
const SNAPSHOT = defineVerb("snapshot", "source folder fsid name uuid?")`
  # told: what btrfs says of the subvolume that is the current directory.
  told() {
    # Behind a fence by its ID: something else may have its name by now.
    id=$(b inspect-internal rootid .)
    case $mode:$snapshot in
      fence:/proc/fs*) b subvolume show -b -r "$id" /proc/fs;;
      fence:*) b subvolume show -b -r "$id" /sys/class;;
      *) b subvolume show -b .;;
    esac
  }
  at "$folder" "$fsid"
  snapshot=$PWD/$name
  if [ -e "$snapshot" ] || [ -L "$snapshot" ]; then exit 76; fi
  cd -P -- "$source"
  [ "$PWD" = "$source" ] || { line "$source leads to $PWD now" >&2; exit 66; }
  if [ -n "$uuid" ]; then
    own=$(told | sed -n "s/^[[:space:]]*UUID:[[:space:]]*//p")
    [ "$own" = "$uuid" ] || { line "$source is another subvolume by now" >&2; exit 66; }
  fi
  b subvolume snapshot -r . "$snapshot" >/dev/null
  if [ "$mode" = fence ]; then
    cd "$snapshot"
    told
  elif root; then
    b subvolume show -b "$snapshot"
  else
    id=$(b inspect-internal rootid "$snapshot")
    echo " UUID: id:$id"
    echo " Subvolume ID: $id"
  fi
`;

/** The list of subvolumes, with the generations that they have once all is on the disk. */
const GENERATIONS = defineVerb("generations", "folder fsid")`
  at "$folder" "$fsid"
  b filesystem sync . >&2
  b subvolume list -a -c -u -q -R .
`;

/**
 * Takes the snapshot `name` of `source` (for the path ".") and of subvolumes below it, in the folders
 * of the same paths below `folder`, back to back. Prints a line for each path, `ok` or why not; then
 * how many hundredths of a second the snapshots took, and the list of subvolumes, which tells their
 * UUIDs.
 */
const SNAPSHOTS = defineVerb("snapshots", "source folder fsid name paths...")`
  at "$folder" "$fsid"
  root=$PWD
  now() { read -r up rest </proc/uptime; line "\${up%.*}\${up#*.}"; }
  began=$(now)
  for path; do
    above=
    there=$source
    if [ "$path" = . ]; then
      :
    else
      above=/\${path#./}
      there=\${source%/}$above
    fi
    snapshot=\${root%/}$above/$name
    if [ -e "$snapshot" ] || [ -L "$snapshot" ]; then
      line "$name is there"
    elif cd -P -- "$there" 2>/dev/null; then
      if [ "$PWD" = "$there" ]; then
        if said=$(b subvolume snapshot -r . "$snapshot" 2>&1); then echo ok; else line "\${said##*ERROR: }"; fi
      else
        line "$there leads to $PWD now"
      fi
    else
      line "it is not there any more"
    fi
  done
  echo $(($(now) - began))
  cd -P -- "$root"
  b subvolume list -a -c -u -q -R .
`;

/**
 * What there is in a directory of snapshots that others took: all subvolumes of its filesystem, and
 * what snapper says of its own, in sections that begin with a NONCE: see parseForeign.
 */
const FOREIGN = defineVerb("foreign", "nonce dir")`
  ${ENTER}
  say() { echo; line "$nonce $1"; }
  enter "$dir"
  [ -n "$fenced" ] || [ -z "$strange" ] || { line "$dir: others can change $strange" >&2; exit 65; }
  say dir; line "$here"
  say mounts; cat /proc/self/mountinfo
  say subvolumes; b subvolume list -a -c -u -q -R .
  say readonly; b subvolume list -a -r .
  say snapper
  for file in ./[0-9]*/info.xml; do
    # A FIFO in its place keeps nobody waiting.
    (
      opened "$file" 2>/dev/null
      while IFS= read -r text; do
        case $text in
          *"<date>"*|*"<description>"*) line "$file $text";;
        esac
      done <&6
    ) || :
  done
  echo; echo "$nonce end"
`;

/**
 * The stream of `snapshot`, on standard output; in full if `parent` is empty, compressed unless
 * `level` is, as long as `holder` lives. Cut short it still ends well for zstd, but never for
 * `btrfs receive`. If `skip` bytes (a multiple of 64 KiB) with the SHA-256 `sum` are kept over
 * there, the stream must begin with the same, and only the rest is sent. Where others can change
 * names, `uuid` and `clone` (in hexadecimal) are what the stream must say of itself and of its
 * parent. The `parent` of this and of the verbs below is a name, or a path from the folder.
 */
const SEND = defineVerb(
  "send",
  "flag folder fsid level protocol holder snapshot parent skip sum uuid? clone?",
)`
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
  # The current directory stays the same, whatever its name becomes.
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
  # A parent in another folder can stand where others give the names.
  beyond=
  case $parent in */*) beyond=yes;; esac
  stream() {
    if [ -z "$uuid" ] || { [ -z "$beyond" ] && ours; }; then
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
  # We cannot kill what sudo runs: it ends with the pipe that it writes to.
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
`;

/**
 * The first 512 bytes of each snapshot's stream, a line of hexadecimal: see changedIn. No file is
 * read for them.
 */
const HEADS = defineVerb("heads", "folder fsid snapshots...")`
  at "$folder" "$fsid"
  for name; do
    head=$(b send -q --no-data "$name" | dd bs=512 count=1 iflag=fullblock 2>/dev/null | od -A n -v -t x1 | tr -d "[:space:]")
    [ -n "$head" ] || exit 1
    echo "$head"
  done
`;

/**
 * The generation of each snapshot's top directory, as lsattr(1) tells it. Nothing where there is no
 * lsattr.
 */
const BIRTHS = defineVerb("births", "folder fsid snapshots...")`
  at "$folder" "$fsid"
  command -v lsattr >/dev/null || exit 0
  lsattr -v -d "$@" || :
`;

/**
 * The contents of a stream: how often each command is in it, how often data of each length (`
 * len=N`), and how often a file is to be compressed (`compressing`). The data are not read for this.
 * `idle`: it yields to all other work, and ends soon after nobody reads any more, whoever lives.
 */
const ESTIMATE = defineVerb("estimate", "folder fsid snapshot parent idle?")`
  at "$folder" "$fsid"
  if [ -n "$idle" ]; then
    renice -n 19 -p $$ >/dev/null 2>&1 || :
    ionice -c 3 -p $$ >/dev/null 2>&1 || :
    (
      printf %s backup-waiting >/proc/self/comm
      trap "" PIPE
      while sleep 1 >/dev/null 2>&1; [ -d "/proc/$$" ]; do echo 2>/dev/null || kill -KILL 0; done
    ) &
  fi
  stream() {
    if [ -n "$parent" ]; then
      b send -q --no-data -p "./$parent" "./$snapshot"
    else
      b send -q --no-data "./$snapshot"
    fi
  }
  # Whoever has files here chooses their names, where a space has a backslash before it, and their
  # attributes, which are printed as they are, with newlines: what these seem to say is left out.
  time=$(line "$snapshot" | grep -o "[0-9]*-[0-9]*$" || :)
  own() { grep "^[a-z_]*  *./[^/]*$time" | sed "/^set_xattr /s/ data=.*//"; }
  lines() { grep -o -e "^[a-z_]*" -e " offset=[0-9]* len=[0-9]*$" -e " name=btrfs.compression$"; }
  short() { sed -e "s/ offset=[0-9]* / /" -e "s/ name=btrfs.compression/compressing/"; }
  stream | btrfs receive --dump | own | lines | short | sort | uniq -c
`;

/**
 * The data that a subvolume has got since a generation, as `estimate` tells those of a stream. They
 * are not read.
 */
const GROWN = defineVerb("grown", "source generation")`
  ${ENTER}
  enter "$source"
  extents() { grep -o "^inode [0-9]* file offset [0-9]* len [0-9]* disk start [0-9]* offset [0-9]* gen [0-9]* flags [A-Z|,]*"; }
  written() { grep -v -e PREALLOC -e HOLE || :; }
  echo "1 snapshot"
  b subvolume find-new . "$generation" | extents | written | grep -o " len [0-9]*" | tr " " = | sed "s/^=len/ len/" | sort | uniq -c
`;

/**
 * Whether anything in a snapshot is stored compressed, or, without one, whether the subvolumes that
 * are made in the folder will be, which have that property from the one around them: a line if so.
 */
const COMPRESSED = defineVerb("compressed", "folder fsid snapshot")`
  at "$folder" "$fsid"
  if [ -n "$snapshot" ]; then
    b subvolume find-new "./$snapshot" 0 | grep -m 1 -o "flags COMPRESS" || :
  else
    b property get -t inode . compression
    until [ "$(stat -c %i .)" = 256 ] || [ . -ef .. ]; do cd ..; done
    b property get -t inode . compression
  fi
`;

/** How much of a difference without its data is read at most, in bytes: some 100,000 commands. */
const REWRITTEN_MOST = "32000000";

/**
 * A difference without the data of its files; of a large one only the beginning, with `most` only
 * so many bytes.
 */
const REWRITTEN = defineVerb("rewritten", "folder fsid snapshot parent most?")`
  at "$folder" "$fsid"
  b send -q --no-data -p "./$parent" "./$snapshot" | head -c "\${most:-${REWRITTEN_MOST}}"
`;

/** A difference without the data of its files, all of it. */
const DIFFERENCE = defineVerb("difference", "folder fsid snapshot parent")`
  at "$folder" "$fsid"
  b send -q --no-data -p "./$parent" "./$snapshot"
`;

/**
 * The same between `parent` and what `source` is now: a snapshot of the hidden `name`, which goes
 * whatever ends this. As long as anything of it lives, the snapshot is locked.
 */
const DIFFERENCE_NOW = defineVerb("difference-now", "source folder fsid name parent")`
  at "$folder" "$fsid"
  root=$PWD
  if [ -e "./$name" ] || [ -L "./$name" ]; then line "$here/$name is there" >&2; exit 76; fi
  gone() {
    cd -P -- "$root"
    if [ -d "./$name" ]; then delete_one "./$name" any >/dev/null; fi
  }
  # Whoever clears what others left waits until ours is locked.
  exec 7<.
  flock -w 60 7 || { line "another run keeps $here locked" >&2; exit 75; }
  cd -P -- "$source"
  [ "$PWD" = "$source" ] || { line "$source leads to $PWD now" >&2; exit 66; }
  # A shell that a signal ends runs no other trap.
  trap gone EXIT
  trap "exit 1" TERM HUP INT PIPE
  b subvolume snapshot -r . "$root/$name" >/dev/null
  cd -P -- "$root"
  if [ -r "./$name" ]; then
    exec 8<"./$name"
    flock -n 8
  fi
  exec 7<&-
  b send -q --no-data -p "./$parent" "./$name"
`;

/** Deletes the snapshots that interrupted comparisons left, but for those that are locked. */
const CLEAR_COMPARED = defineVerb("clear-compared", "folder fsid names...")`
  at "$folder" "$fsid"
  exec 7<.
  flock -w 60 7 || { line "another run keeps $here locked" >&2; exit 75; }
  for name; do
    if [ -L "./$name" ]; then continue; fi
    [ -d "./$name" ] && [ -r "./$name" ] || continue
    exec 8<"./$name"
    if flock -n 8; then delete_one "./$name" any >/dev/null; fi
    exec 8<&-
  done
`;

/**
 * The size of each path in a snapshot, and of the same file in a parent, or -; nothing where there
 * is no such path.
 */
const FILE_SIZES = defineVerb("filesizes", "folder fsid snapshot parent paths...")`
  at "$folder" "$fsid"
  # elsewhere INODE PARENT: number and size of the file, which has another path there, or -.
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
`;

/**
 * Takes the stream, see `send`. The record says `beginning` and `rest` meanwhile, and { and `rest`
 * afterwards: the announcement comes, and goes when all is on the disk; with a `sync` of `next`,
 * the next transfer's replaces it. Unless `part` is empty, the stream is that file, if it is
 * complete; with a `flag` of guard's (one that ends in C) the stream is standard input all the
 * same.
 */
const RECEIVE = defineVerb(
  "receive",
  "flag folder fsid level holder prefix header key beginning rest part? sum? bytes? kept? sync?",
)`
  ${RECORD}
  ${RECEIVING}
  ${WATCH}
  ${COMPLETE}
  watch "$holder"
  at "$folder" "$fsid"
  receiving "$prefix" 0
  if [ -n "$part" ]; then
    # Others who can change names could put another stream in its place: it is opened once, and must
    # be ours.
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
  # Without the fence, in the folder of a destination, where the parents are: a chroot keeps a
  # stream out of the directories above.
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
  # Of a disk that is unmounted meanwhile, btrfs receive says that a file is not there; behind the
  # fence, it goes on unseen.
  result=0
  take || result=1
  at "$folder" "$fsid"
  [ $result = 0 ] || exit 1
  # Its data are only in memory until now: the announcement stays so long. A restore syncs at its
  # end.
  [ "$sync" = later ] || b filesystem sync . >&2
  # What the next transfer writes will replace it.
  if [ "$sync" = next ]; then exit 0; fi
  if [ -n "$header" ]; then
    record "$header" "$key" "{$rest" "$beginning"
    # The new name of the record, too: else the announcement could come back.
    sync .
  fi
`;

/**
 * The part of the stream `object` that a broken transfer left to go on from: its file
 * `.OBJECT.pPROTOCOL-LEVEL.part`, how many bytes of it count, and their SHA-256. Where others can
 * write, they could put a link in its place.
 */
const KEPT = defineVerb("kept", "folder fsid prefix object")`
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
`;

/** Removes all parts that were kept to go on from. */
const TIDY = defineVerb("tidy", "folder fsid prefix")`
  ${RECEIVING}
  at "$folder" "$fsid"
  receiving "$prefix" 10
  digits="[0-9][0-9][0-9][0-9]"
  for file in ./.*.part; do
    case $file in
      "./.$prefix"$digits$digits-$digits*_*_*_*_*_*.btrfs*.p[0-2]-*.part) rm -f "$file";;
    esac
  done
`;

/**
 * Removes what a broken transfer left, and its announcement. A read-only subvolume (an orphaned
 * receive completed it after all) stays, unless `how` is `whole`: it is in doubt whether its data
 * are on the disk.
 */
const DISCARD = defineVerb("discard", "folder fsid prefix name header key value how?")`
  ${RECORD}
  ${RECEIVING}
  at "$folder" "$fsid"
  receiving "$prefix" 10
  if [ -e "./$name" ] && { [ "$how" = whole ] || [ "$(b property get -ts "./$name" ro)" = ro=false ]; }; then
    delete_one "./$name" "\${how:+any}" >&2
    b filesystem sync .
  fi
  if [ -n "$value" ]; then record "$header" "$key" "$value"; fi
`;

/**
 * those IDS TOP ./NAME...: whether these subvolumes, in a folder whose path from the top level is
 * TOP, still have these IDs: names may have changed owners since the decision. A process for each;
 * for many, the list of all.
 */
const SAME_IDS = sh`
  those() {
    left=$1 above=\${2#/}
    shift 2
    # Paths are told from the top level, which has no name.
    above=\${above:+$above/}
    # Received just now, into a directory that nobody else can enter.
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
 * Deletes many at once, as ./NAME, if they still have their IDs. A subvolume that cannot be deleted
 * is as before, and the cause is told where it is an attribute, which a snapshot has from its
 * source. The cleaner sleeps for up to 30 s unless a sync wakes it.
 */
const DELETE = defineVerb("delete", "convert folder fsid top ids names...")`
  ${SAME_IDS}
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
    # Only their IDs cannot be changed by others; for a few, this takes no more processes.
    # shellcheck disable=SC2086 # several words
    delete_ids $ids >/dev/null || stays "$@"
  else
    those "$ids" "$top" "$@"
    if [ "$convert" = rw ]; then
      for name; do b property set -f -ts "$name" ro false || :; done
    fi
    b subvolume delete "$@" >/dev/null || stays "$@"
  fi
`;

// ── restoring ──

/**
 * Makes the directory `work` that a restore works in, marks it as ours, and holds it locked; see
 * CLEAR.
 */
const RESTORING = defineVerb("restoring", "folder fsid work end silence")`
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
`;

/**
 * Mounts the top level of a filesystem where nobody has data, in a mount namespace of its own, which
 * ends with the last process in it. Prints that directory, the default subvolume of the filesystem,
 * and what mounts at the next start go by: the kernel's command line and /etc/fstab.
 */
const TOP = defineVerb("top", "device filesystem end silence")`
  ${KEEP}
  for spot in /sys/bus /proc/tty /proc/bus; do
    if [ -d "$spot" ]; then break; fi
  done
  # Without a namespace of its own, everybody would see it.
  [ "$mode" = fence ]
  # The kernel calls the root of a system without initramfs /dev/root, which need not be there.
  for found in /sys/fs/btrfs/"$filesystem"/devices/*; do
    [ -b "$device" ] || device=/dev/\${found##*/}
  done
  mount -t btrfs -o subvolid=5,nodev,nosuid -- "$device" "$spot"
  mount --make-private -- "$spot"
  echo $$
  line "$spot"
  b subvolume get-default "$spot" || echo unknown
  cat /proc/cmdline
  if [ -r /etc/fstab ]; then cat /etc/fstab; fi
  echo
  line "$end"
  keep "$silence"
`;

/**
 * behind PATH: sets $behind to the name of an absolute path behind the fence, where it is below the
 * same mount.
 */
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

/**
 * Removes the remains of an interrupted restore: the subvolumes ./PATH, in the order of their IDs,
 * and the directory `work`. Prints why it stays, where it is not one of ours.
 */
const CLEAR = defineVerb("clear", "folder fsid work ids paths...")`
  at "$folder" "$fsid"
  if [ -d "./$work" ] && [ -z "$(find "./$work" -prune -type l)" ]; then :; else exit 0; fi
  [ -f "./$work/.btrfs-backup.finishing" ] && exit 0
  [ -f "./$work/.btrfs-backup.restoring" ] ||
    { rmdir "./$work" 2>/dev/null || line "$here/$work is not from a restore, and stays"; exit 0; }
  above=$PWD
  (
    # Where others can make a directory of that name, they can put a link in its place.
    cd -P -- "./$work"
    [ "$PWD" = "\${above%/}/$work" ] && [ -O . ] ||
      { line "$here/$work is not from a restore of this user, and stays"; exit 0; }
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
    # A tree that was a plain directory: what is left of it are directories, and files of ours.
    if [ -d ./tree ] && [ -z "$(find ./tree -prune -type l)" ]; then
      find ./tree -depth "(" -type d -exec rmdir {} ";" -o -type f -name ".btrfs-backup.*" -exec rm -f {} ";" ")"
    fi
    rm -f .btrfs-backup.*
    cd ..
    rmdir "./$work"
  )
`;

/** The end of BUILD and NEST: the snapshot itself, in the current directory. */
const ITS_SNAPSHOT = sh`
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
  if [ "$origin" = "$work/$name" ]; then delete_one "$origin" any >/dev/null; fi`;

/**
 * Makes WORK/tree, a writable snapshot of `origin` (empty: of WORK/NAME, which was received), and
 * the snapshot `name` in `target`, a folder of the tree unless absolute. `how` is `keep`: with the
 * origin's received UUID; `plain`: without one; or `none`: no snapshot. The tree is a user's, who
 * may have put a symbolic link there. Stubs of snapshots that were nested in the source go (inode
 * 2, which is rmdir's).
 */
const BUILD = defineVerb("build", "folder fsid work origin target name how")`
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
  ${ITS_SNAPSHOT}
`;

/**
 * reach BASE PATH [alike]: enters BASE, which is there, and each directory of PATH below it, through
 * no link. What is missing is made; `alike`: for the users that can enter the one above it. A stub
 * of a nested subvolume (inode 2) is none that anything can stand in.
 */
const REACH = sh`
  pass() { cd -P -- "$1" && [ "$PWD" = "$1" ] || { line "\${1#"$work/tree/"} is not a plain folder in this backup" >&2; exit 65; }; }
  reach() {
    pass "$1"
    rest=$2
    while [ -n "$rest" ]; do
      part=\${rest%%/*}
      rest=\${rest#"$part"}
      rest=\${rest#/}
      if [ -d "./$part" ] && [ "$(stat -c %i "./$part")" = 2 ]; then rmdir "./$part"; fi
      if [ -e "./$part" ] || [ -L "./$part" ]; then
        :
      else
        mkdir "./$part"
        if [ -n "$3" ]; then
          chown "$(stat -c %u:%g .)" "./$part"
          chmod "$(stat -c %a .)" "./$part"
        fi
      fi
      pass "$PWD/$part"
    done
  }`;

/**
 * As BUILD, a subvolume of a tree, at its place `member` below WORK/tree. Its snapshot stands in
 * `rest` below `base`, a folder of the tree unless absolute, with the lock of `base`. An empty
 * subvolume "members" in WORK tells that all below WORK/tree is ours: see leftoversOf.
 */
const NEST = defineVerb("nest", "folder fsid work origin member base within name how prefix")`
  ${BEHIND}
  ${REACH}
  at "$folder" "$fsid"
  cd -P -- "./$work"
  work=$PWD
  [ -d ./members ] || b subvolume create "$work/members" >/dev/null
  if [ -n "$origin" ]; then behind "$origin"; origin=$behind; else origin=$work/$name; fi
  above=
  case $member in */*) above=/\${member%/*};; esac
  reach "$work" "tree$above" alike
  touch -r . "$work/.btrfs-backup.times"
  # In a snapshot, an empty directory stands in the place of a nested subvolume.
  rmdir "./\${member##*/}" 2>/dev/null || :
  if [ -e "./\${member##*/}" ] || [ -L "./\${member##*/}" ]; then
    line "$member: the backup of the subvolume around it has something else in its place" >&2
    exit 65
  fi
  b subvolume snapshot "$origin" "$PWD/\${member##*/}" >/dev/null
  touch -r "$work/.btrfs-backup.times" .
  case $base in
    /*)
      behind "$base"
      base=$behind
      ;;
    *)
      reach "$work/tree" "$base"
      base=$work/tree/$base
      ;;
  esac
  reach "$base" "$within"
  find . -mindepth 1 -maxdepth 1 -inum 2 -exec rmdir {} +
  lock=.btrfs-backup.$prefix.lock
  if [ -e "./$lock" ] || [ -L "./$lock" ] || [ -z "$within" ]; then
    :
  else
    make "$base/$lock"
    ln "$base/$lock" "./$lock"
  fi
  ${ITS_SNAPSHOT}
`;

/**
 * Gives a tree in `work` the name of TARGET, and the present TARGET its own name with the time of
 * the restore, and moves snapshots from one folder to another. The task comes as lines of input:
 * these folders, `old` or `new`, HOW and NAME in turn (`move`, or `copy` for received ones, which
 * would lose their received UUID), and `end`. It stands in a file until it is done, so that it can
 * be gone on with, `how` being empty, wherever it was interrupted. Prints where the snapshots are
 * to be, the names of those that cannot move, each with two slashes behind it, and `end`; nothing if
 * there is nothing to be finished. `mark`: until then, a subvolume "members" in WORK tells of it, as
 * it does in a tree; the list of subvolumes shows it where the directory itself is not mounted. If
 * the present TARGET is the default subvolume, the tree becomes that with its name.
 */
const FINISH = defineVerb("finish", "folder fsid work how mark?")`
  ${BEHIND}
  ${COMPLETE}
  at "$folder" "$fsid"
  list=./$work/.btrfs-backup.finishing
  if [ "$how" = begin ]; then
    [ -z "$mark" ] || [ -d "./$work/members" ] || b subvolume create "$PWD/$work/members" >/dev/null
    (
      cd "./$work"
      into .btrfs-backup.told
      [ "$(tail -n 1 .btrfs-backup.told)" = end ]
      mv -T .btrfs-backup.told .btrfs-backup.finishing
    )
    # The restored data are on the disk before anything else loses its name.
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
  # alive COMMAND...: a command that was killed has not failed: FINISH is to be gone on with.
  alive() {
    "$@" && return
    [ $? -lt 128 ] || { echo "it was killed" >&2; exit 1; }
    return 1
  }
  # Whether all can move is known before the first name changes: a snapshot that is being sent
  # cannot be made writable.
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
    # No name has changed yet: it is as if it had not begun, but one of them can be writable.
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
  # A mount without subvol= takes the default subvolume, which is known by its ID.
  default=
  was=none
  if [ -n "$before" ] && [ -d "./$before" ]; then
    default=$(b subvolume get-default . 2>/dev/null) || :
    was=$(b inspect-internal rootid "./$before")
  fi
  case "$default " in
    "ID $was "*) b subvolume set-default "$(b inspect-internal rootid "./$target")" .;;
  esac
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
  # carry HOW NAME: moves one, however far that had come, or adds its name to $stuck.
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
    fi || stuck=$stuck$2//
  }
  # Nothing is printed until all is done: the asker can be gone, and writing to nobody would end
  # this.
  stuck=
  each carry "$@"
  b filesystem sync . >/dev/null
  if [ -d "./$work/members" ]; then rmdir "./$work/members" || :; fi
  rm -f "./$work"/.btrfs-backup.*
  rmdir "./$work" || :
  line "$told"
  line "$stuck"
  echo end
`;

// ── looking into trees ──

/**
 * The paths that every digest and listing of a tree is made of: all but the top and stubs of nested
 * subvolumes (inode 2), which are not sent. Incremental streams do not carry the top's own mtime.
 */
const PATHS = sh`
  paths() {
    { find . -mindepth 1 "(" -inum 2 -prune -o "$@" -print0 ")" || echo failed >&3; } | { sort -z || echo failed >&3; }
  }`;

const ATTRIBUTES = `--numeric-owner --xattrs --xattrs-include="*"`;

/**
 * SHA-256 of a tree with all that a stream carries. GNU tar gives the same bytes for the same tree
 * in POSIX format without atime, ctime and its process ID, but leaves sockets out. ACLs come as
 * plain attributes: with --acls, tar would write the names that users have on this host.
 */
const DIGEST = defineVerb("digest", "folder fsid snapshot")`
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
  # What has been read: a child's I/O is added to its parent's, see proc(5).
  count() { while read -r k v; do case $k in wchar:) echo "bytes $v" >&4;; esac; done </proc/self/io; }
  exec 4>&1
  bad=$( { { pack --mtime=@0 .; sockets; paths | pack --null --verbatim-files-from -T -; count; } | sha256 >&4; } 3>&1 )
  [ -z "$bad" ]
`;

/**
 * A listing to find differences in: `stat --printf FORMAT` of every path, the SHA-256 of every
 * file, and where getfattr is installed all extended attributes, each part ended by an empty word;
 * in base64, since names are bytes and not always text.
 */
const LISTING = defineVerb("listing", "folder fsid snapshot format")`
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
`;

/**
 * When each subvolume that has a parent was made, in UTC: this goes for all that were received as a
 * difference. One process, whatever their number.
 */
const MADE = defineVerb("made", "folder fsid")`
  at "$folder" "$fsid"
  TZ=UTC0
  export TZ
  b subvolume list -a -s -u .
`;

/**
 * When directories were made, in s since 1970, as far as the kernel tells: for a subvolume that is
 * not a snapshot, when it was made itself. (A snapshot has its directory from its origin.)
 */
const BORN = defineVerb("born", "folder fsid names...")`
  at "$folder" "$fsid"
  stat -c "%W %n" -- "$@"
`;

/** Of each ./NAME a line with the name, and one with the creation time. */
const RECEIVED = defineVerb("received", "folder fsid names...")`
  at "$folder" "$fsid"
  for name; do
    line "$name"
    b subvolume show "$name" | grep "Creation time:"
  done
`;

/** Bytes referenced by each ./NAME, as `btrfs filesystem du -s --raw` tells. */
const SIZES = defineVerb("sizes", "folder fsid names...")`
  at "$folder" "$fsid"
  b filesystem sync . >/dev/null
  b filesystem du -s --raw "$@"
`;

/**
 * What quotas count for each subvolume of a filesystem, if they are on and right: `btrfs qgroup show`.
 * Simple quotas do not tell what is shared.
 */
const QUOTAS = defineVerb("quotas", "folder fsid filesystem")`
  at "$folder" "$fsid"
  quotas=/sys/fs/btrfs/$filesystem/qgroups
  told() { if [ -r "$quotas/$1" ]; then read -r value <"$quotas/$1"; else value=$2; fi; }
  if [ -d "$quotas" ]; then
    told mode qgroup
    mode=$value
    told inconsistent 0
    if [ "$mode $value" = "qgroup 0" ]; then
      b filesystem sync . >/dev/null
      b qgroup show --raw . 2>/dev/null || :
    fi
  fi
`;

/**
 * The subvolume that `file` is, or was, in, and the path in it. The last component of its path is
 * taken as it is.
 */
const LOCATE = defineVerb("locate", "file")`
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
`;

/**
 * Of `inner`, a path, in every subvolume that has it: what `realpath` makes of the directory above
 * it, as NUL-terminated words after "open" and that of the folder itself, since a symbolic link may
 * lead out of a snapshot (only "fenced", where the kernel follows none); an empty word; and `stat
 * --printf FORMAT`. `word` is printf's format of a word.
 */
const VERSIONS = defineVerb("versions", "folder fsid format word inner names...")`
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
`;

/** origin: enters the directory of `inner` in a snapshot. Its parameters are those of TAKE. */
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
const TAKE = defineVerb("take", "folder fsid snapshot inner")`
  ${ORIGIN}
  origin
  tar --create --format=posix --sparse ${ATTRIBUTES} -- "./\${inner##*/}"
`;

/**
 * DIRECTORY/NAME becomes `base` of the archive on standard input, or `inner` of a subvolume here;
 * whole or not at all, and over another file only with `force`.
 */
const PUT = defineVerb("put", "directory name force base folder? fsid? snapshot? inner?")`
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
  # What was killed left its directory, which nobody holds any more. Others may give it another name
  # at any moment: what is removed is in the directory that was looked at.
  above=$PWD
  for old in ./.btrfs-backup.put-??????; do
    (
      cd -P -- "$old" 2>/dev/null || exit 0
      [ "$PWD" = "\${above%/}/\${old#./}" ] || exit 0
      [ -O . ] && [ -f ./.btrfs-backup.putting ] || exit 0
      exec 9<.
      flock -n 9 || exit 0
      find . -mindepth 1 -delete
      rmdir "../\${old#./}" || :
    )
  done
  temporary=$(mktemp -d "$PWD/.btrfs-backup.put-XXXXXX")
  exec 9<"$temporary"
  flock -n 9
  into "$temporary/.btrfs-backup.putting" </dev/null
  mkdir "$temporary/it"
  if [ -n "$folder" ]; then
    ( origin; cp -a --reflink=auto -- "./$base" "$temporary/it/$base" )
  else
    tar --extract --preserve-permissions --same-owner ${ATTRIBUTES} -C "$temporary/it" -f -
  fi
  mv -T -- "$temporary/it/$base" "./$name"
  # A file that is said to be back is on the disk.
  sync -f . 2>/dev/null || sync
`;

// ── stored streams ──

/**
 * The parameters of the verbs of a store. `lock`, which those hold that write, is the prefix of a
 * chain in a folder, and a file for a remote.
 */
const STORE_TAKES = {
  /** Takes a stream. `size`: of a part for S3; for a file, how much of it is kept. */
  store: "folder fsid lock object holder size",
  /**
   * Makes a stream complete, with its checksum object beside it; never if another stream has the
   * UUID.
   */
  commit: "folder fsid lock object sum bytes part? kept? uuid?",
  /** Prints objects, or the checksum of one if `how` is `sum`. */
  fetch: "folder fsid how holder objects...",
  /**
   * Deletes objects in the order given, a checksum object only after its stream; with one process,
   * if no stream of these checksum objects is there.
   */
  drop: "folder fsid lock objects...",
  /** Writes a small object, which is there whole or not at all, in place of an earlier one. */
  keep: "folder fsid lock object text",
} as const;
/** Where streams are stored: these, and `list` (which is `open` for a folder). */
type StoreVerbs = {
  readonly [V in keyof typeof STORE_TAKES]: Declared<(typeof STORE_TAKES)[V]>;
} & {
  /** As a pipeline calls what stores. */
  readonly called: string;
  /** Whether it is a directory with a lock, where a part can be kept, and `fetch` prints several. */
  readonly isDirectory: boolean;
};
type StoreVerb = StoreVerbs["store"];
type CommitVerb = StoreVerbs["commit"];
type DropVerb = StoreVerbs["drop"];

/** sumfile OBJECT SUM BYTES: the text of a checksum object. */
const SUM_FILE = sh`
  sumfile() { printf %s "$2  $1"; echo; echo "# $3 bytes"; }`;

/** The part of both kinds of `get` behind a function `get OBJECT`. */
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

/**
 * A file has a temporary name until it is complete, and on the disk. Others may be able to write
 * there: no link that they plant is followed.
 */
const RAW: StoreVerbs = {
  called: "storing",
  isDirectory: true,
  store: defineVerb("store", STORE_TAKES.store)`
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
  commit: defineVerb("commit", STORE_TAKES.commit)`
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
  fetch: defineVerb("fetch", STORE_TAKES.fetch)`
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
  drop: defineVerb("drop", STORE_TAKES.drop)`
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
  keep: defineVerb("keep", STORE_TAKES.keep)`
    ${RECEIVING}
    at "$folder" "$fsid"
    receiving "$lock" 10
    [ -f "./\${object%${KEPT_MARK}}" ] || { line "$here/\${object%${KEPT_MARK}} is gone" >&2; exit 66; }
    rm -f "./.$object.part"
    line "$text" | into "./.$object.part" fsync
    mv -T -f "./.$object.part" "./$object"
    sync .
  `,
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
 * Options of rclone, as variables (rclone(1)), that would hide from us what is stored: filters, and
 * those that change how names are listed or bytes are printed. Whoever does not see a stream stores
 * it again, over the old one.
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
  unset ${HIDING.map((name) => `RCLONE_${name}`).join(" ")}
  # Else rclone builds a table for terminals first, which is half of its start.
  TCELL_MINIMIZE=1
  export TCELL_MINIMIZE`;

/**
 * Objects of a remote cannot be renamed everywhere: without a checksum object, one is not complete.
 */
const RCLONE: StoreVerbs & { readonly list: Declared<"folder"> } = {
  called: "rclone",
  isDirectory: false,
  list: defineVerb("rclone-list", "folder")`
    ${ALL_OBJECTS}
    command -v rclone >/dev/null || { echo "rclone not found: install rclone" >&2; exit 69; }
    remote=\${folder%%[:,]*}
    rclone listremotes --long | {
      while read -r name type; do
        if [ "$name" = "$remote:" ]; then line "$type"; fi
      done
      echo
    }
    answers=$(mktemp -d)
    exec 3>"$answers/about" 5>"$answers/errors"
    exec 4<"$answers/about" 6<"$answers/errors"
    # They have no names any more: whatever ends this, nothing is left.
    rm -rf "$answers"
    # How much is free, where the remote can tell: beside the listing, and without patience.
    rclone about --json --contimeout 5s --timeout 10s --retries 1 --low-level-retries 1 -- "$folder" >&3 2>/dev/null </dev/null &
    result=0
    rclone lsf --files-only --format sp --separator " " -- "$folder" 2>&5 || result=$?
    said=$(cat <&6)
    wait
    about=$(tr -d "[:space:]" <&4)
    # 3: there is no such directory yet.
    case $result/$said in
      0/*|3/*) line "about $about";;
      *)
        line "$said" >&2
        case $said in
          *"no such host"*|*refused*|*unreachable*|*timeout*|*"timed out"*) exit 66;;
        esac
        exit 1
        ;;
    esac
  `,
  store: defineVerb("rclone-store", STORE_TAKES.store)`
    ${ALL_OBJECTS}
    ${LOCKED}
    locked "$lock" 0
    RCLONE_S3_CHUNK_SIZE=\${RCLONE_S3_CHUNK_SIZE:-$size}
    RCLONE_S3_UPLOAD_CONCURRENCY=\${RCLONE_S3_UPLOAD_CONCURRENCY:-2}
    export RCLONE_S3_CHUNK_SIZE RCLONE_S3_UPLOAD_CONCURRENCY
    exec rclone rcat -- "$folder$object"
  `,
  commit: defineVerb("rclone-commit", STORE_TAKES.commit)`
    ${ALL_OBJECTS}
    ${LOCKED}
    ${SUM_FILE}
    locked "$lock" 10
    size=$(rclone lsf --format s -- "$folder$object")
    [ "$size" = "$bytes" ] || { echo "only \${size:-none} of $bytes bytes arrived" >&2; exit 1; }
    sumfile "$object" "$sum" "$bytes" | rclone rcat -- "$folder$object${SUM}"
  `,
  fetch: defineVerb("rclone-fetch", STORE_TAKES.fetch)`
    ${ALL_OBJECTS}
    get() { rclone cat -- "$folder$1"; }
    every() { for object; do get "$object"; done; }
    ${GET}
  `,
  drop: defineVerb("rclone-drop", STORE_TAKES.drop)`
    ${ALL_OBJECTS}
    ${LOCKED}
    locked "$lock" 10
    # One after the other, as they are given: each stream before the one that it builds on.
    for object; do line "$object"; done | rclone delete --checkers 1 --transfers 1 --files-from-raw - -- "$folder"
  `,
  keep: defineVerb("rclone-keep", STORE_TAKES.keep)`
    ${ALL_OBJECTS}
    ${LOCKED}
    locked "$lock" 10
    line "$text" | rclone rcat -- "$folder$object"
  `,
};

/**
 * The streams in full below a folder, by their paths: no store of a tree's member is without one.
 */
const FULL_STREAMS = "*full.btrfs*";
const BELOW = defineVerb("below", "folder fsid")`
  at "$folder" "$fsid"
  find . -mindepth 2 -type f -name "${FULL_STREAMS}"
`;
const REMOTE_BELOW = defineVerb("rclone-below", "folder")`
  ${ALL_OBJECTS}
  exec rclone lsf -R --files-only --include "${FULL_STREAMS}" -- "$folder"
`;

/**
 * What `rclone about --json` says: bytes that are free on a remote, and its size; Infinity for what
 * it does not say, as of most object stores.
 */
function parseAbout(text: string): { free: number; size: number } {
  const count = (word: string) =>
    Number(new RegExp(`"${word}":(\\d+)[,}]`).exec(text)?.[1] ?? Infinity);
  return { free: count("free"), size: count("total") };
}

/** The checksums in a text of several checksum objects, by the names of their objects. */
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

/**
 * The entries of `btrfs subvolume list`, one at a time: there can be many. A line of no known shape
 * continues a path with a line break. Errors: Failure.
 */
function* listedLines(text: string, shape: RegExp): Generator<RegExpExecArray> {
  let last: RegExpExecArray | null = null;
  // A name can end in a line break: then an empty line follows.
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
 * Reads `btrfs subvolume list -a -c -u -q -R` and `-a -r` of one filesystem (btrfs-subvolume(8)).
 * With -a all paths count from the top level, some with a mark; without, some count from where one
 * asks.
 */
export function parseSubvolumes(all: string, readonlyOnes: string): Subvolume[] {
  const readonly = new Set<string>();
  for (const [, id, path] of listedLines(readonlyOnes, LISTED_READONLY))
    readonly.add(`${id} ${path}`);
  const subvolumes: Subvolume[] = [];
  for (const match of listedLines(all, LISTED)) {
    const [, id = "", cgen = "", parent = "", received = "", uuid = "", path = ""] = match;
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
  // Any user can make subvolumes, and a name with a line break could pass for a subvolume of its
  // own. A dangerous one would need a path, an ID or a UUID that another subvolume has already.
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
 * The generation in which a snapshot was changed last, from the head of its stream. The head holds
 * path, UUID and ctransid, behind a magic, a version and the header of the command
 * (linux/fs/btrfs/send.h). Errors: Failure for any other shape.
 */
export function changedIn(head: string, snapshot: Subvolume): number {
  const bytes = Buffer.from(head, "hex");
  const end = 31 + (bytes.length > 31 ? bytes.readUInt16LE(29) : 0);
  const begins =
    bytes.toString("latin1", 0, 13) === "btrfs-stream\0" &&
    bytes.length >= end + 32 &&
    bytes.readUInt16LE(27) === 15;
  const [uuid, ctransid] = [0x0010_0001, 0x0008_0002]; // their lengths and numbers
  if (
    !begins ||
    bytes.readUInt32LE(end) !== uuid ||
    bytes.readUInt32LE(end + 20) !== ctransid ||
    bytes.toString("hex", end + 4, end + 20) !== dataOf(snapshot).replaceAll("-", "")
  )
    throw new Failure(`"btrfs send" began with something unknown: ${head.slice(0, 200)}`);
  return Number(bytes.readBigUInt64LE(end + 24));
}

/** A field of `btrfs subvolume show`. */
function shownField(text: string, field: string): string {
  const value = new RegExp(`^\\s+${field}:\\s+(\\S+)`, "m").exec(text)?.[1];
  if (value === undefined)
    throw new Failure(`"btrfs subvolume show" printed no "${field}":\n${text}`);
  return value;
}

/** `root` is the path on the filesystem of `device` that is mounted at `path`. */
export type Mount = {
  readonly id: string;
  readonly parent: string;
  readonly root: string;
  readonly path: string;
  readonly device: string;
  readonly readonly: boolean;
  /** What is written there is compressed, or nobody can tell. */
  readonly compresses?: true;
};

/** Filesystems that compress by a mount option, or not at all. */
const PLAIN = /^(btrfs|ext[234]|xfs|tmpfs|vfat|exfat|ntfs3?)$/;

/** A path as tables of mounts write it, which show some characters by their octal numbers. */
const unescapedPath = (word = "") =>
  word.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(parseInt(octal, 8)));

/** Reads /proc/self/mountinfo (proc(5)). */
export function parseMounts(text: string): Mount[] {
  return text.split("\n").map((line) => {
    const words = line.split(" ");
    const [id = "", parent = "", , root, path, options] = words;
    const [type = "", device] = words.slice(words.indexOf("-") + 1);
    const compresses =
      !PLAIN.test(type) || /(^|,)compress(-force)?(=(?!no)|,|$)/.test(words.at(-1) ?? "");
    return {
      id,
      parent,
      root: unescapedPath(root),
      path: unescapedPath(path),
      device: unescapedPath(device),
      readonly: [options, words.at(-1)].some((some) => some?.split(",").includes("ro")),
      ...(compresses ? { compresses } : {}),
    };
  });
}

/** A resolved path from the filesystem's top level ("/…"), and the mount it is seen through. */
export function placeOn(mounts: readonly Mount[], path: string): { mount: Mount; top: string } {
  const known = new Set(mounts.map(({ id }) => id));
  const above = mounts.filter((one) => isWithin(path, one.path));
  // As the kernel walks: what is mounted over a folder hides what was mounted below it.
  const isOn = (one: Mount, under?: Mount) =>
    under === undefined
      ? !known.has(one.parent) || one.parent === one.id
      : one.parent === under.id && one !== under;
  const next = (under?: Mount) =>
    above
      .filter((one) => isOn(one, under))
      .reduce<Mount | undefined>(
        (first, one) => (first && first.path.length < one.path.length ? first : one),
        undefined,
      );
  let mount = next();
  // Another host could print mounts that lie in a circle.
  const walked = new Set<Mount>();
  for (let inner = mount; inner !== undefined && !walked.has(inner); inner = next(inner))
    walked.add((mount = inner));
  if (mount === undefined) throw new Failure(`${path}: not found among the mounts`);
  const rest = mount.path === "/" ? path : path.slice(mount.path.length);
  return { mount, top: withoutSlash(normalize(`${mount.root}/${rest}`)) };
}

/**
 * The filesystem whose files show `fsid` (hexadecimal, from `stat -f -c %i`): btrfs_statfs() in the
 * kernel folds the UUID into it and adds the ID of the subvolume. Needs no root, unlike blkid.
 */
export function filesystemOf(fsid: string, root: number, uuids: readonly string[]): string | null {
  const folded = BigInt(`0x${fsid}`) ^ BigInt(root);
  const isUuid = new RegExp(`^(${UUID})$`);
  const found = uuids.find((uuid) => {
    if (!isUuid.test(uuid)) return false;
    const hex = uuid.replaceAll("-", "");
    const part = (from: number) => BigInt(`0x${hex.slice(from, from + 8)}`);
    return (((part(0) ^ part(16)) << 32n) | (part(8) ^ part(24))) === folded;
  });
  return found ?? null;
}

/** The ID of the subvolume that a path from the filesystem's top level is in. */
function rootOf(top: string, subvolumes: readonly Subvolume[]): number {
  const above = subvolumes.filter(({ path }) => isWithin(top, `/${path}`));
  const topLevel = { id: 5, path: "" };
  return above.reduce(
    (deepest, one) => (one.path.length > deepest.path.length ? one : deepest),
    topLevel,
  ).id;
}

/** A directory that was looked at. */
export type Place = {
  readonly path: string;
  readonly inode: number;
  /** The kernel's, of its subvolume. */
  readonly fsid: string;
  /** Null where it is not btrfs. */
  readonly filesystem: string | null;
  readonly root: number;
  /** Bytes there. */
  readonly free: number;
  readonly size: number;
};

/** All that `open` tells. */
export type Inspection = {
  readonly host: string;
  /** Whether zstd is installed there. */
  readonly zstd: boolean;
  /**
   * The newest protocol of send streams that kernel and btrfs-progs know; 1 if it was not asked
   * for.
   */
  readonly protocol: number;
  /** False for a folder that would have to be made; then `place` is its parent. */
  readonly exists: boolean;
  readonly locked: boolean;
  /** The process that holds the lock there. */
  readonly holder: string;
  readonly place: Place;
  /** The folder's path from the filesystem's top level. */
  readonly top: string;
  readonly source: (Place & { readonly uuid: string; readonly top: string }) | null;
  readonly mounts: readonly Mount[];
  /**
   * All of the filesystem. Where we are not root (`alone`), only those in the folder, and without
   * UUIDs: a subvolume with a pin's name has the pin's UUID.
   */
  readonly subvolumes: readonly Subvolume[];
  readonly alone: boolean;
  readonly entries: ReadonlySet<string>;
  /** Plain files in it, where it is opened for stored streams. */
  readonly files: readonly StoredFile[];
  /** When they were written, in ms since 1970. */
  readonly written: ReadonlyMap<string, number>;
  readonly record: RecordFile;
  readonly old: OldRecord;
  /**
   * Tells one mounting of the folder's filesystem from others: the host's boot, and the inode of
   * the filesystem in /sys/fs/btrfs.
   */
  readonly since: string;
  /** Our user ID there. */
  readonly user: string;
  /** Verbs can work behind the fence there: see PRELUDE. */
  readonly fenced: boolean;
  /** Else the first directory on the way there that others than root and we can change, if any. */
  readonly strange: string;
  /** The folder and this program's files in it belong to the user that we are there, or to root. */
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

/** The sections that `open` prints of any place, and of some. */
const ALWAYS =
  "host zstd boot filesystems fence strange user inodes places mounts record stream".split(" ");
const SOMETIMES =
  "source folder missing locked entries old files subvolumes readonly roots alone dir snapper end".split(
    " ",
  );

/** The sections of what `open` printed. Errors: Failure for one that is unknown, or comes twice. */
function sectionsOf(output: string, nonce: string): Map<string, string> {
  if (!output.startsWith(`\n${nonce} `))
    throw new Failure(
      `the login shell there prints something of its own, which would damage streams: ${output.trim().slice(0, 100)}`,
    );
  const sections = new Map<string, string>();
  for (const part of output.split(`\n${nonce} `).slice(1)) {
    const end = part.indexOf("\n");
    const name = part.slice(0, end);
    if (sections.has(name) || ![...ALWAYS, ...SOMETIMES].includes(name))
      throw new Failure(`the host prints what it was not asked for: ${JSON.stringify(name)}`);
    sections.set(name, part.slice(end + 1).replace(/\n$/, ""));
  }
  return sections;
}

/** Lines that are all of one form. */
const linesOf = (form: string) => new RegExp(`^(?:${form}\\n)*${form}$`);
const PATH_SHAPE = /^\/[^\0]*$/;
const SHAPES: Readonly<Record<string, RegExp>> = {
  source: PATH_SHAPE,
  folder: PATH_SHAPE,
  missing: PATH_SHAPE,
  host: /^[^\n\0]+$/,
  user: /^\d+$/,
  locked: /^\d+$/,
  fence: /^(yes)?$/,
  roots: linesOf("\\d+"),
  inodes: linesOf("\\d+ \\d+ \\S+"),
  places: linesOf("[0-9a-f]+ [0-9a-f]+ \\d+ \\d+ \\d+"),
};

/**
 * Checks that a host has told all that it was asked for, and in the known shapes. Errors: Failure.
 */
function checkAnswer(
  output: string,
  nonce: string,
  { source = "" }: { readonly source?: string },
): void {
  const sections = sectionsOf(output, nonce);
  const isWrong = ([name, shape]: [string, RegExp]) => {
    const text = sections.get(name);
    if (text === undefined) return false;
    return !shape.test(text) || (shape === PATH_SHAPE && text !== withoutSlash(normalize(text)));
  };
  const isFolder = sections.has("folder");
  const wrong =
    ALWAYS.find((name) => !sections.has(name)) ??
    (sections.has("source") !== (source !== "") ? "source" : undefined) ??
    (isFolder === sections.has("missing") || isFolder !== sections.has("entries")
      ? "folder"
      : undefined) ??
    Object.entries(SHAPES).find(isWrong)?.[0];
  if (wrong !== undefined)
    throw new Failure(`the host does not print what it was asked for: ${wrong}`);
}

const fieldsOf = (text = "") => text.split("\n").map((line) => line.split(" "));

/** Reads what stat(1) told of a directory. Errors: Failure for any other shape. */
function parseStat(path: string, [inode = ""]: string[] = [], filesystem: string[] = []) {
  const [fsid = "", type, free, unit, all] = filesystem;
  if (path === "" || !/^\d+$/.test(inode) || !/^[0-9a-f]+$/.test(fsid))
    throw new Failure(`cannot read what "stat" printed of ${path}: ${inode} ${fsid}`);
  const [bytesFree, bytes] = [Number(free) * Number(unit), Number(all) * Number(unit)];
  return { type, place: { path, inode: Number(inode), fsid, free: bytesFree, size: bytes } };
}

/**
 * The directories that were entered, with the IDs of their subvolumes (`roots`). The keys of
 * `mounted` are the UUIDs of the host's filesystems. Errors: Failure.
 */
function parsePlaces(
  sections: ReadonlyMap<string, string>,
  paths: readonly string[],
  roots: readonly number[],
  mounted: ReadonlyMap<string, string>,
): Place[] {
  const inodes = fieldsOf(sections.get("inodes"));
  const filesystems = fieldsOf(sections.get("places"));
  return paths.map((path, i) => {
    const { type, place } = parseStat(path, inodes[i], filesystems[i]);
    const root = type === BTRFS_MAGIC && !sections.has("files") ? (roots[i] ?? 0) : 0;
    if (root === 0) return { ...place, root, filesystem: null };
    const filesystem = filesystemOf(place.fsid, root, [...mounted.keys()]);
    if (filesystem !== null) return { ...place, root, filesystem };
    if (i === paths.length - 1)
      throw new Failure(`${path}: its filesystem is not in /sys/fs/btrfs`);
    // SOURCE can lie on another filesystem than the one whose subvolumes were listed, which is an
    // error anyway.
    return { ...place, root, filesystem: `with the ID ${place.fsid}` };
  });
}

/**
 * Refuses a place below a bind mount of a plain folder: there btrfs receive cannot find the parent.
 */
function refuseBindMount(path: string, mount: Mount, subvolumes: readonly Subvolume[]): void {
  if (mount.root === "/" || subvolumes.some((one) => `/${one.path}` === mount.root)) return;
  throw new Failure(
    `${path} is below ${mount.path}, a bind mount of the plain folder ${mount.root} of its filesystem: use the path below that filesystem's own mount point`,
  );
}

/** Whether only root and `user` can change a file, by its inode, owner and mode. */
const isTrusted = ([, owner, mode = ""]: readonly string[], user: string) =>
  (owner === user || owner === "0") && !/^.(?:....w|.{7}w)/.test(mode);

/** Reads what `open` printed. Errors: Failure for any shape that is not known. */
export function parseInspection(output: string, nonce: string, folder: string): Inspection {
  const sections = sectionsOf(output, nonce);
  const section = (name: string) => sections.get(name) ?? "";
  const mounts = parseMounts(section("mounts"));
  const record = parseRecord(section("record"));
  const files = parseFiles(section("files"));
  const [exists, alone] = [sections.has("folder"), sections.has("alone")];
  const paths = [section(exists ? "folder" : "missing")];
  if (sections.has("source")) paths.unshift(section("source"));
  const seen = paths.map((path) => placeOn(mounts, path));
  const { mount, top } = seen.at(-1) as (typeof seen)[0];
  const subvolumes = alone
    ? parseAlone(section("alone"), top, record)
    : parseSubvolumes(section("subvolumes"), section("readonly"));
  const roots = alone
    ? section("roots").split("\n").map(Number)
    : seen.map((one) => rootOf(one.top, subvolumes));
  const mounted = new Map(
    fieldsOf(section("filesystems")).map((line) => [basename(line.at(-1) ?? ""), line[0] ?? ""]),
  );
  const places = parsePlaces(sections, paths, roots, mounted);
  const here = places.at(-1) as Place;
  if (exists && !alone && here.filesystem !== null) refuseBindMount(here.path, mount, subvolumes);
  const user = section("user");
  const [source] = places.slice(0, -1).map((place) => {
    const isListed = !alone && place.filesystem === here.filesystem;
    const itself = isListed ? subvolumes.find(({ id }) => id === place.root) : undefined;
    return { ...place, top: seen[0]?.top as string, uuid: itself?.uuid ?? "" };
  });
  return {
    since:
      here.filesystem === null ? "" : `${section("boot")}/${mounted.get(here.filesystem) ?? ""}`,
    user,
    fenced: section("fence") !== "",
    strange: section("strange"),
    trusted: fieldsOf(section("inodes"))
      .slice(places.length - 1)
      .every((line) => isTrusted(line, user)),
    host: section("host"),
    zstd: section("zstd") !== "",
    protocol: parseProtocol(section("stream")),
    exists,
    locked: sections.has("locked"),
    holder: section("locked"),
    place: here,
    top: exists ? top : `${top === "/" ? "" : top}${folder.slice(folder.lastIndexOf("/"))}`,
    source: source ?? null,
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

/**
 * Reads the kernel's send_stream_version, and `btrfs --version`: btrfs-progs know protocol 2 since
 * 6.0 (CHANGES).
 */
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

/** A destination that a source knows. */
export type KnownDestination = {
  readonly location: string;
  readonly filesystem: string | null;
  /** The snapshot that both share. */
  readonly pin: Pin | null;
  /** When a run last served it, as ISO 8601. */
  readonly last: string | null;
  /** UUIDs of snapshots that runs tried to send, and could not. */
  readonly failed?: readonly string[];
  /** Announced by 0.3.1. */
  readonly receiving?: readonly string[];
  /**
   * Snapshots that were changed since they were taken, by UUID, and are all the same as the backup
   * there. They were compared when this generation was their last.
   */
  readonly cleared?: Cleared;
  /** The last run named it as --optional. */
  readonly optional?: true;
};
export type Cleared = Readonly<Record<string, number>>;

/**
 * What a snapshot was taken over from, which may be gone by now: that one's parent UUID, its ID, the
 * generation of its creation, and what its maker said of it.
 */
export type Imported = {
  readonly of: string;
  readonly id: number;
  readonly cgen: number;
  readonly words?: string;
};

/**
 * What a record says of one prefix; every part optional, since a folder can be both ends of a
 * chain.
 */
export type ChainRecord = {
  readonly owner?: SourceIdentity;
  /** The name that is being received, and `since` of the place (see Inspection) when that began. */
  readonly receiving?: string;
  readonly since?: string;
  /** UUIDs of backups that are another source's: never pruned. */
  readonly strangers?: readonly string[];
  /**
   * Many strangers, as only the file has them: all backups up to this subvolume ID, but for these
   * UUIDs.
   */
  readonly elders?: { readonly until: number; readonly but: readonly string[] };
  readonly destinations?: readonly KnownDestination[];
  /** UUIDs that the data of backups go by which came when later ones were there. */
  readonly belated?: readonly string[];
  /** Names that the clock leapt to, and that --adopt-clock vouched for. */
  readonly leaps?: readonly string[];
  /** What somebody keeps here. */
  readonly kept?: readonly KeptOne[];
  /** Snapshots that were taken over from others, by UUID. */
  readonly imported?: Readonly<Record<string, Imported>>;
  /** The destinations were written by a guarded key, which must not be believed. */
  readonly guarded?: true;
  /**
   * The chain is the root of a tree. `gone`: by the path of a subvolume, the name of the run from
   * which on it was not there any more.
   */
  readonly tree?: { readonly gone: Readonly<Record<string, string>> };
  /** A run with --if-changed has found nothing that differs from the newest snapshot. */
  readonly unchanged?: Unchanged;
};

/** What a run has found: at a moment, as ISO 8601, nothing had changed since a snapshot. */
export type Unchanged = { readonly uuid: string; readonly at: string };

/** `.btrfs-backup.json`. Unreadable: nothing may be deleted there, and it is not written. */
export type RecordFile = {
  readonly chains: ReadonlyMap<string, ChainRecord>;
  readonly unreadable: string | null;
  /**
   * By prefix and received UUID, how many bytes the streams of a guarded key's backups had: see
   * --max-bytes.
   */
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
      if (prefix.startsWith("/") && areNumbers(chain)) stored.set(prefix.slice(1), chain as Stored);
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

/** Whether a value in a record is what it should be. */
type ValueCheck = (value: unknown) => boolean;
const isText: ValueCheck = (value) => typeof value === "string";
const areNumbers: ValueCheck = (value) =>
  Object.values(value as object).every((one) => Number.isSafeInteger(one));
const areTexts: ValueCheck = (value) => Array.isArray(value) && value.every(isText);
const ifAny =
  (check: ValueCheck): ValueCheck =>
  (value) =>
    value === undefined || check(value);
const orNull =
  (check: ValueCheck): ValueCheck =>
  (value) =>
    value === null || check(value);
/** Checks every field of a record's part. Fields of later versions may be there, too. */
const fieldsAre =
  <T>(checks: { readonly [Field in keyof T]-?: ValueCheck }): ValueCheck =>
  (value) =>
    Object.entries<ValueCheck>(checks).every(([field, check]) =>
      check((value as Record<string, unknown>)[field]),
    );

const isDestination = fieldsAre<KnownDestination>({
  location: isText,
  filesystem: orNull(isText),
  pin: orNull(fieldsAre<Pin>({ name: isText, uuid: isText })),
  last: orNull(isText),
  failed: ifAny(areTexts),
  receiving: ifAny(Array.isArray),
  cleared: ifAny(areNumbers),
  optional: ifAny((value) => value === true),
});

const isKeptOne = fieldsAre<KeptOne>({ name: isText, uuid: isText, note: isText });
/** A path below a folder, of plain names. */
const isMemberPath = (path: string) => path.split("/").every((name) => entryName(name) !== null);
const areGone: ValueCheck = (value) =>
  Object.getPrototypeOf(value) === Object.prototype &&
  Object.entries(value as object).every(
    ([path, name]) => isMemberPath(path) && isText(name) && prefixOf(name as string) !== null,
  );
const isImported = fieldsAre<Imported>({
  of: isText,
  id: Number.isSafeInteger,
  cgen: Number.isSafeInteger,
  words: ifAny(isText),
});

const isChain = fieldsAre<ChainRecord>({
  owner: ifAny(fieldsAre<SourceIdentity>({ uuid: isText, host: isText, path: isText })),
  receiving: ifAny(isText),
  since: ifAny(isText),
  strangers: ifAny(areTexts),
  elders: ifAny(
    fieldsAre<ChainRecord["elders"] & {}>({ until: Number.isSafeInteger, but: areTexts }),
  ),
  destinations: ifAny((all) => Array.isArray(all) && all.every(isDestination)),
  belated: ifAny(areTexts),
  leaps: ifAny(areTexts),
  kept: ifAny((all) => Array.isArray(all) && all.every(isKeptOne)),
  imported: ifAny((all) => Object.values(all as object).every(isImported)),
  guarded: ifAny((value) => value === true),
  tree: ifAny(fieldsAre<ChainRecord["tree"] & {}>({ gone: areGone })),
  unchanged: ifAny(fieldsAre<Unchanged>({ uuid: isText, at: isText })),
});

/** Refuses a chain that this program does not write so. Errors: Error, or TypeError for null. */
function checkChain(chain: ChainRecord): void {
  const isPlain = Object.getPrototypeOf(chain) === Object.prototype;
  const isSaidTwice = chain.strangers !== undefined && chain.elders !== undefined;
  if (!isPlain || isSaidTwice || !isChain(chain))
    throw new Error("a field is not what it should be");
}

/** How many strangers a record lists by their UUIDs; a line has room for some 2,000. */
const LISTED_STRANGERS = 500;

/** The backups of a prefix that a record can speak of. */
const ofPrefix = (standing: readonly Entry[], prefix: string) =>
  standing.filter(({ name }) => parseName(name, prefix) !== null);

/**
 * A chain's record as it is written: many strangers by a rule instead of a list. A rule that still
 * says the same stays as it is: a backup that is not there just now may come back.
 */
export function asWritten(
  { strangers, elders, ...chain }: ChainRecord,
  standing: readonly Entry[],
  prefix: string,
): ChainRecord {
  const foreign = new Set(strangers);
  if (elders !== undefined) {
    const ruled = asRead({ elders }, standing, prefix).strangers ?? [];
    if (ruled.length === foreign.size && ruled.every((uuid) => foreign.has(uuid)))
      return { ...chain, elders };
  }
  if (strangers === undefined) return chain;
  if (strangers.length <= LISTED_STRANGERS) return { ...chain, strangers };
  const all = ofPrefix(standing, prefix);
  const until = all.reduce(
    (last, { id, uuid }) => (foreign.has(uuid) ? Math.max(last, id) : last),
    elders?.until ?? 0,
  );
  const own = all.filter(({ id }) => id <= until).map(({ uuid }) => uuid);
  const but = [...(elders?.but ?? []), ...own].filter((uuid) => !foreign.has(uuid));
  return { ...chain, elders: { until, but: [...new Set(but)] } };
}

/** A chain's record, in which what is gone is not kept. */
export function withoutGone(
  { kept, ...chain }: ChainRecord,
  standing: readonly Subvolume[],
): ChainRecord {
  const there = new Set(standing.map(dataOf));
  const left = (kept ?? []).filter(({ uuid }) => there.has(uuid));
  return left.length === 0 ? chain : { ...chain, kept: left };
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

/**
 * The remains of 0.2 to 0.3.1 in `.outstanding_transfers`: for each destination's ID the names it
 * concerns.
 */
export type OldRecord = {
  readonly receiving: ReadonlyMap<string, readonly string[]>;
  readonly parents: ReadonlyMap<string, readonly string[]>;
};

/**
 * Reads `{NAME: {"locks": [ID…], "parent_locks": [ID…]}}`, or 0.2's `{NAME: [ID…]}`; nonsense is
 * nothing.
 */
export function parseOldRecord(text: string): OldRecord {
  const announced = new Map<string, string[]>();
  const parents = new Map<string, string[]>();
  const add = (map: Map<string, string[]>, ids: unknown, name: string) => {
    for (const id of Array.isArray(ids) ? ids : [])
      if (typeof id === "string") map.set(id, [...(map.get(id) ?? []), name]);
  };
  try {
    const all = JSON.parse(text || "{}") as Record<
      string,
      { locks?: unknown; parent_locks?: unknown }
    >;
    for (const [name, locks] of Object.entries(all)) {
      add(announced, Array.isArray(locks) ? locks : locks.locks, name);
      add(parents, locks.parent_locks, name);
    }
  } catch {
    log.debug(".outstanding_transfers of btrfs-backup 0.3.1 cannot be read");
  }
  return { receiving: announced, parents };
}

// ── 5. Locations ─────────────────────────────────────────────────────────────────────────

/** A place opened for one prefix: a snapshot folder, a folder of backups, or a store of streams. */
export type Folder = Omit<Inspection, "host" | "files"> &
  Readonly<{
    id: string;
    host: Host;
    hostName: string;
    path: string;
    prefix: string;
    /** Null where subvolumes stand. */
    store: Store | null;
    /** All subvolumes directly in it, or all its stored streams. */
    standing: readonly Entry[];
    /** Those with a name of the prefix, oldest first. */
    snapshots: readonly Snapshot[];
    chain: ChainRecord;
    /** Its path below the place whose holder keeps it; empty where that is its own. */
    within: string;
    /** Makes it, and its lock, where it is one of a tree's folders and there was none. */
    join?: () => Promise<Folder>;
    close: () => Promise<void>;
  }>;

/** Stored streams. `type`: rclone's word for such a remote, whose objects `path` names. */
export type Store = ReturnType<typeof parseStreams> &
  Readonly<{
    verbs: StoreVerbs;
    type: string | null;
  }>;

type Hosts = Readonly<{
  sshOptions: readonly string[];
  sudo: boolean;
  sshSudo: boolean;
}>;

/** How to open a place. */
type Opening = Readonly<{
  prefix: string;
  /** `look` locks nothing; else the seconds to wait for the lock. */
  wait: "look" | number;
  hosts: Hosts;
  source?: string;
  /** Streams need no checksum object. */
  unverified?: boolean;
  /** A host whose protocol is asked for anyway. */
  peer?: Host;
  /** The opening begins now, and locks and looks in its `turn`, unless it is `unwanted`. */
  ahead?: { readonly turn: Promise<void>; readonly unwanted: AbortSignal };
  /** Called as soon as the place is locked, or later. */
  locked?: () => void;
}>;

/** An opening that may have begun already. */
type BegunOpening = Opening & { readonly begun?: Promise<Folder> | undefined };

type Check = (folder: Folder) => void;

/** A source's UUID. The list of subvolumes lacks the top level. */
async function uuidOfSource(host: Host, { source, place, alone }: Inspection): Promise<string> {
  if (source?.root !== 5 || source.inode !== 256 || source.filesystem !== place.filesystem || alone)
    return source?.uuid ?? "";
  const asked = { folder: source.path, fsid: `${source.fsid}/` };
  const shown = await ask(host, SHOW, asked, source.path);
  return uuidOrNull(shownField(shown, "UUID")) ?? place.filesystem ?? ""; // old versions of mkfs gave it none
}

/**
 * The names that were announced before the filesystem was mounted as it is now. btrfs receive makes
 * a subvolume read-only, with a received UUID, while the data are still in memory: after a power
 * cut, files of such a backup can be empty, however complete it looks.
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
  const chain = folder.record.chains.get(prefix) ?? {};
  const doubted = doubtedIn(folder);
  const belated = new Set(chain.belated);
  // Without root, UUIDs are not told, and names have to do.
  const notes = new Map(
    chain.kept?.map(({ name, uuid, note }) => [folder.alone ? name : uuid, shownNote(note)]),
  );
  const noteOf = (entry: Entry) =>
    parseName(entry.name, prefix) === null
      ? undefined
      : notes.get(folder.alone ? entry.name : dataOf(entry));
  const standing = folder.standing.map((entry) => {
    const isBelated = belated.has(entry.receivedUuid ?? "");
    const note = noteOf(entry);
    if (!isBelated && note === undefined && !doubted.has(entry.name)) return entry;
    return {
      ...entry,
      readonly: entry.readonly && !doubted.has(entry.name), // nobody takes it for complete
      ...(isBelated ? { belated: true as const } : {}),
      ...(note === undefined ? {} : { kept: note }),
    };
  });
  const snapshots = snapshotsAmong(standing, prefix, folder.source?.uuid ?? null);
  return { ...folder, prefix, standing, snapshots, chain };
}

/** Where verbs start for a place in a mount namespace, which only root itself can enter. */
const inNamespace = ({ namespace }: Readable) =>
  namespace === undefined ? {} : { namespace, sudo: false };

/** Opens a place: one command locks it, and tells all there is to know. Errors: those of `ask`. */
async function openFolder(location: Readable, path: string, opening: Opening): Promise<Folder> {
  if (!isDirectory(location)) return openRemote(location, path, opening);
  const { id } = location;
  const { prefix, wait } = opening;
  const host = { ...hostOf(location.host, opening.hosts), ...inNamespace(location) };
  await connected(host, id);
  if (opening.ahead?.unwanted.aborted) throw new Failure(`${id}: not needed any more`);
  const nonce = crypto.randomUUID();
  const { output, release } = await holdOpen(location, host, { nonce, folder: path }, opening);
  try {
    if (wait === "look") await release(); // nothing of it is left in the directory
    checkAnswer(output, nonce, opening);
    const seen = parseInspection(output, nonce, path);
    if (wait !== "look") needOurs(seen, id);
    const store = holdsStreams(location)
      ? { ...parseStreams(seen.files, true), verbs: RAW, type: null }
      : null;
    const standing = store?.streams ?? subvolumesIn(seen);
    const chains = new Map(
      [...seen.record.chains].map(([of, chain]) => [of, asRead(chain, standing, of)]),
    );
    const folder = {
      ...seen,
      source: seen.source && { ...seen.source, uuid: await uuidOfSource(host, seen) },
      record: { ...seen.record, chains },
      id,
      host: behindFence(host, seen),
      hostName: seen.host,
      path: seen.exists ? seen.place.path : join(seen.place.path, basename(path)),
      within: "",
      store,
      standing,
      close: release,
    };
    return withPrefix(folder, prefix);
  } catch (error) {
    await release();
    throw error;
  }
}

/** How a folder of a tree stands below its place, as MEMBERS tells. */
type MemberSeen = Readonly<{
  state: string;
  entries: ReadonlySet<string>;
  record: RecordFile;
  files: ReturnType<typeof parseFiles>;
  inode: number;
  fsid: string;
  trusted: boolean;
}>;

/** A folder that is not there. */
const UNSEEN: MemberSeen = {
  state: "missing",
  entries: new Set(),
  record: { chains: new Map(), unreadable: null },
  files: [],
  inode: 0,
  fsid: "",
  trusted: true,
};

/** What MEMBERS printed: of all, and then of each folder. Errors: Failure for any other shape. */
function memberSections(output: string, nonce: string): Map<string, string>[] {
  const [beginning, ...parts] = output.split(`\n${nonce} `);
  if (beginning !== "" || parts.pop()?.trim() !== "end")
    throw new Failure(`something unknown was told of folders: ${output.trim().slice(0, 100)}`);
  const blocks = [new Map<string, string>()];
  for (const part of parts) {
    const end = part.indexOf("\n");
    const name = part.slice(0, end);
    if (name === "member") blocks.push(new Map());
    blocks.at(-1)?.set(name, part.slice(end + 1).replace(/\n$/, ""));
  }
  return blocks;
}

/** Lines of fields and a path, by the path. */
const byPath = (text = "", fields: RegExp) =>
  new Map(
    text.split("\n").flatMap((line) => {
      const found = fields.exec(line);
      return found === null ? [] : [[line.slice(found[0].length), found[0].split(" ")] as const];
    }),
  );

/** Reads what MEMBERS printed. Errors: Failure for any other shape. */
export function parseMembers(
  output: string,
  nonce: string,
  user: string,
): ReadonlyMap<string, MemberSeen> {
  const [all, ...members] = memberSections(output, nonce);
  const fsids = byPath(all?.get("fsids"), /^[0-9a-f]+ /);
  const stats = byPath(all?.get("inodes"), /^\d+ \d+ \S+ /);
  const read = (member: ReadonlyMap<string, string>): [string, MemberSeen] => {
    const section = (name: string) => member.get(name) ?? "";
    const path = section("member");
    const [here, fsid] = [stats.get(path), fsids.get(path)];
    if (here === undefined || fsid === undefined) throw new Failure(`${path} changes meanwhile`);
    const record = stats.get(`${path}/.btrfs-backup.json`) ?? here;
    const seen = {
      state: section("state"),
      entries: new Set(section("entries").split("\n")),
      record: parseRecord(section("record")),
      files: parseFiles(section("files")),
      inode: Number(here[0]),
      fsid: fsid[0] as string,
      trusted: isTrusted(here, user) && isTrusted(record, user),
    };
    return [path.slice(2), seen];
  };
  return new Map(members.map(read));
}

/** How the folders of a tree are opened: below which place, and what each is the folder of. */
type FoldersOpening = Opening & {
  readonly location: Readable;
  /** The subvolume whose snapshots stand in the folder of a path; null where backups stand. */
  readonly sourceOf?: (path: string) => Folder["source"];
};

/**
 * Opens folders below an opened place, by few commands for all of them. They have the place's lock,
 * and stay open as long as it does. One that has a lock of its own is opened by itself. Errors:
 * those of `ask`; of a single folder, the promise of that one has them.
 */
async function openMemberFolders(
  root: Folder,
  paths: readonly string[],
  opening: FoldersOpening,
): Promise<Map<string, Promise<Folder>>> {
  const seen = new Map<string, MemberSeen>();
  // Without the fence, each way is looked at on its own.
  for (const some of root.exists && root.fenced
    ? inArguments(paths.map((path) => `./${path}`))
    : []) {
    const nonce = crypto.randomUUID();
    const given = {
      nonce,
      prefix: root.prefix,
      kind: root.store === null ? "" : "streams",
      paths: some,
    };
    const output = await askAt(root, MEMBERS, given, "cannot look into the folders below");
    for (const [path, one] of parseMembers(output, nonce, root.user)) seen.set(path, one);
  }
  return new Map(
    paths.map((path) => {
      const folder = openMember(root, path, seen.get(path) ?? UNSEEN, opening);
      folder.catch(() => {}); // whoever needs it is told
      return [path, folder];
    }),
  );
}

/** Opens one folder below a place. Errors: those of `openFolder`. */
async function openMember(
  root: Folder,
  path: string,
  seen: MemberSeen,
  opening: FoldersOpening,
): Promise<Folder> {
  if (seen.state === "own" || (root.exists && !root.fenced)) return openAlone(root, path, opening);
  const { state, files, entries } = seen;
  const exists = state !== "missing";
  const [there, top] = [join(root.path, path), join(root.top, path)];
  const store = root.store && { ...parseStreams(files, true), verbs: RAW, type: null };
  const standing = store?.streams ?? subvolumesIn({ ...root, top, entries });
  const chains = new Map(
    [...seen.record.chains].map(([of, one]) => [of, asRead(one, standing, of)]),
  );
  const here = {
    path: there,
    inode: seen.inode,
    fsid: seen.fsid,
    root: rootOf(top, root.subvolumes),
  };
  const folder = withPrefix(
    {
      ...root,
      id: placeBelow(opening.location, path).id,
      path: there,
      within: join(root.within, path),
      exists,
      locked: root.locked && state === "linked",
      top,
      source: opening.sourceOf?.(path) ?? null,
      place: exists ? { ...root.place, ...here } : root.place,
      entries,
      record: { ...seen.record, chains },
      old: parseOldRecord(""),
      written: new Map(files.map(({ name, written }) => [name, written])),
      trusted: root.trusted && seen.trusted,
      store,
      standing,
      close: async () => {},
    },
    root.prefix,
  );
  return { ...folder, join: () => joinedMember(root, folder, path, opening) };
}

/** Opens a folder below a place by itself. Errors: those of `openFolder`. */
function openAlone(root: Folder, path: string, opening: FoldersOpening): Promise<Folder> {
  const source = opening.sourceOf?.(path)?.path;
  return openFolder(placeBelow(opening.location, path), join(root.path, path), {
    ...opening,
    ...(source === undefined ? {} : { source }),
  });
}

/** A folder of a tree that is there, and locked. Errors: Failure, those of `openFolder`. */
async function joinedMember(
  root: Folder,
  folder: Folder,
  path: string,
  opening: FoldersOpening,
): Promise<Folder> {
  const given = { prefix: root.prefix, paths: [`./${path}`] };
  const made = (await askAt(root, JOIN, given, `cannot create ${folder.path}`)).trim();
  const [state, ...rest] = made.split(" ");
  if (state === "failed") throw new Failure(`cannot create ${folder.path}: ${rest.join(" ")}`);
  const { path: there } = folder;
  if (state === "own") return openAlone(root, path, opening);
  const { fsid, root: subvolume } = folder.exists ? folder.place : root.place;
  const place = { ...folder.place, path: there, inode: Number(rest[0]), fsid, root: subvolume };
  return { ...folder, exists: true, locked: true, place };
}

/** Starts the command that locks a place and tells of it: see OPEN. */
function holdOpen(
  location: Readable,
  host: Host,
  place: { readonly nonce: string; readonly folder: string },
  { prefix, wait, source = "", peer, ahead, locked }: Opening,
): Promise<Held> {
  const known = peer !== undefined && sameHost(peer, host) ? "known" : "";
  const asked = {
    ...place,
    wait: ahead === undefined ? String(wait) : "later",
    prefix,
    source,
    kind: holdsStreams(location) ? "streams" : known,
    silence: secondsOfSilence(host),
  };
  return holdVerb({ ...host, fence: "try" }, OPEN, asked, {
    end: `${place.nonce} end`,
    what: location.id,
    first: ahead?.turn.then(() => String(wait)),
    unwanted: ahead?.unwanted,
    seen: locked && { line: `${place.nonce} locked`, tell: locked },
    wait: wait === "look" ? 0 : wait,
  });
}

/** The subvolumes directly in a folder. */
function subvolumesIn({
  top,
  subvolumes,
  entries,
}: Pick<Inspection, "top" | "subvolumes" | "entries">): Entry[] {
  const above = top === "/" ? "/" : `${top}/`;
  return subvolumes
    .filter(({ path }) => `/${path}`.startsWith(above))
    .flatMap((one): Entry[] => {
      const name = entryName(one.path.slice(above.length - 1));
      return name !== null && entries.has(name) ? [{ ...one, name, moment: null }] : [];
    });
}

/** A host as a folder's verbs run there: in its holder's mount namespace, a new one, or none. */
function behindFence(host: Host, { fenced, holder }: Pick<Inspection, "fenced" | "holder">): Host {
  if (!fenced) return host;
  return { ...host, fence: holder === "" ? "own" : { pid: holder } };
}

/** Errors: Failure where verbs would work without the fence in a place that others can change. */
function needOurs({ fenced, strange }: Pick<Inspection, "fenced" | "strange">, id: string): void {
  if (fenced || strange === "") return;
  throw new Failure(
    `${id}: others can change ${strange}, and could lead us elsewhere from there. Where no mount namespace can be had (see "btrfs-backup help security"), a place must belong to us alone from / on: chown ${strange}, and chmod go-w`,
  );
}

/** Lists a remote of rclone, without a lock. Errors: those of `ask`. */
async function openRemote(
  { id }: Readable,
  path: string,
  { prefix, hosts, unverified = false }: Opening,
): Promise<Folder> {
  const host = { ...hostOf(null, hosts), sudo: false };
  const listed = await ask(host, RCLONE.list, { folder: path }, id);
  const [, type = "", files = "", about = ""] =
    /^([^\n]*)\n\n?(.*)^about ([^\n]*)\n$/ms.exec(listed) ?? [];
  const store = {
    ...parseStreams(parseFiles(files), unverified),
    verbs: RCLONE,
    type: path.startsWith(":") ? (/^:([^,:]+)/.exec(path)?.[1] ?? "") : type,
  };
  const place = { path, inode: 0, fsid: "", filesystem: null, root: 0 };
  const folder = {
    ...NO_INSPECTION,
    id,
    host,
    hostName: "",
    path,
    within: "",
    place: { ...place, ...parseAbout(about) },
    store,
    standing: store.streams,
    close: async () => {},
  };
  return withPrefix(folder, prefix);
}

/** What is known of a place that is no directory. */
const NO_INSPECTION = {
  zstd: false,
  protocol: 1,
  exists: true,
  locked: true,
  holder: "",
  top: "",
  source: null,
  mounts: [],
  subvolumes: [],
  alone: false,
  entries: new Set<string>(),
  written: new Map<string, number>(),
  record: parseRecord(""),
  old: parseOldRecord(""),
  since: "",
  user: "",
  fenced: false,
  strange: "",
  trusted: true,
} satisfies Omit<Inspection, "host" | "files" | "place">;

/** A folder that `check` accepts; any other is closed. Errors: those of `check`. */
async function closedUnless(folder: Folder, check: Check): Promise<Folder> {
  try {
    check(folder);
    return folder;
  } catch (error) {
    await folder.close();
    throw error;
  }
}

/**
 * Opens a place that `check` accepts. A place that was never locked is made then, with its lock
 * file, and opened and checked once more. Errors: those of `openFolder` and `check`.
 */
async function openChecked(
  location: Readable,
  path: string,
  { begun, ...opening }: BegunOpening,
  check: Check,
): Promise<Folder> {
  for (let first = begun; ; first = undefined) {
    const folder = await closedUnless(await (first ?? openFolder(location, path, opening)), check);
    if (folder.locked || opening.wait === "look") return folder;
    if (folder.join !== undefined) return closedUnless(await folder.join(), check);
    await folder.close();
    const asked = { ...at(folder), prefix: opening.prefix };
    await ask(folder.host, CREATE, asked, `cannot create ${path}`);
  }
}

/** Opens a destination, and makes directories above a new one where that is safe: see PARENTS. */
async function openNew(
  location: Readable,
  { source, isKnown }: { readonly source: Folder; readonly isKnown: boolean },
  opening: BegunOpening,
  check: Check,
): Promise<Folder> {
  try {
    return await openChecked(location, location.path, opening, check);
  } catch (error) {
    if (!(error instanceof NoDirectoryAbove) || isKnown) throw error;
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
    return openChecked(location, location.path, { ...opening, begun: undefined }, check);
  }
}

/** Errors: Failure where btrfs lets us only take and delete snapshots. */
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
  [...new Set(entries.map(({ name }) => prefixOf(name)))].filter((one) => one !== null).sort();

/**
 * Opens what can be given back: a folder of backups, a folder of snapshots, or the snapshot folder
 * of a SOURCE. Without a prefix, it is the one that the names there have. Errors: those of
 * `openFolder`, Absent, UsageError for several prefixes.
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
  let path = location.path;
  let opening: Opening = { prefix: prefix ?? "", wait, hosts, unverified };
  for (;;) {
    const folder = await openFolder(location, path, opening);
    const [only = opening.prefix, ...others] = prefixesIn(folder.standing);
    const isNamed = prefix !== null || others.length > 0 || only === opening.prefix;
    if (folder.exists && opening.source === undefined && looksLikeSource(folder, snapshotFolder)) {
      path = resolve(folder.path, snapshotFolder);
      opening = { ...opening, source: folder.path };
    } else if (folder.exists && !isNamed) opening = { ...opening, prefix: only };
    else return closedUnless(folder, () => needReadable(folder, location, prefix));
    await folder.close();
  }
}

/** Whether a folder looks like a SOURCE with this snapshot folder, and holds no backups itself. */
const looksLikeSource = ({ store, standing, place, entries }: Folder, snapshotFolder: string) =>
  store === null &&
  prefixesIn(standing).length === 0 &&
  place.inode === 256 &&
  (snapshotFolder.startsWith("/") || entries.has(snapshotFolder.replace(/^\.\/|\/.*/g, "")));

/** Errors: Absent or UsageError where nothing can be given back from a place as it was named. */
function needReadable(
  { exists, path, standing, store, source, place }: Folder,
  location: Readable,
  prefix: string | null,
): void {
  if (!exists) throw new Absent(`no such directory: ${path} (is the disk mounted?)`);
  const prefixes = prefixesIn(standing);
  if (prefix === null && prefixes.length > 1)
    throw new UsageError(
      `${location.id} holds several prefixes, choose one with -p: ${prefixes.map((one) => JSON.stringify(one)).join(", ")}`,
    );
  const isSubvolume = store === null && (source ?? place).inode === 256;
  if (isSubvolume && prefixes.length === 0 && prefixOf(basename(location.path)) !== null)
    throw new UsageError(`${location.id} is a snapshot itself: name the folder that it is in`);
}

/** Whether a folder is where a source takes its snapshots, which need no received UUID. */
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

/** Warns of equal received UUIDs: `btrfs receive` could take the wrong subvolume for a parent. */
function warnOfDuplicates({ standing, subvolumes, id }: Folder, report: Report): void {
  const ours = new Set(standing.map(({ receivedUuid }) => receivedUuid));
  const received = subvolumes.filter(
    ({ readonly, receivedUuid }) => readonly && receivedUuid !== null && ours.has(receivedUuid),
  );
  const alike = groupBy(received, ({ receivedUuid }) => receivedUuid);
  const [same, ...more] = [...alike.values()].filter(({ length }) => length > 1);
  const others = more.length === 0 ? "" : ` (and ${plural(more.length, "time")} more such)`;
  if (same)
    report.warning(
      `${id}: ${same.length} read-only subvolumes of its filesystem have the same received UUID, which can confuse "btrfs receive"; keep one of ${same.map(({ path }) => path).join(", ")}${others}`,
    );
}

/** The process whose end ends a folder's work on another host. Here, process groups do that. */
const holderOf = ({ host, holder }: Pick<Folder, "host" | "holder">) =>
  host.ssh === null ? "" : holder;

/** A folder's path, and the signs by which a verb knows that it is still the same folder. */
const at = ({ path, place, holder, within }: HeldFolder) => ({
  folder: path,
  fsid: `${place.fsid}/${holder}${within === "" ? "" : `/${within}`}`,
});
type HeldFolder = Pick<Folder, "path" | "place" | "holder" | "within">;

/** Runs a verb in a folder for its output. Errors: those of `ask`, with the folder's name. */
const askAt = <V extends Declared>(
  folder: HeldFolder & Pick<Folder, "id" | "host">,
  script: V,
  given: Omit<ArgumentsOf<V>, "folder" | "fsid">,
  problem: string,
) =>
  ask(
    folder.host,
    script,
    { ...at(folder), ...given } as unknown as ArgumentsOf<V>,
    `${folder.id}: ${problem}`,
  );

const RECORD_BYTES = 90 * 1024; // a pipeline with it must fit into one argument of 128 KiB: execve(2)

const NO_RECORD = { header: "", key: "", value: "" } as const;

/** The arguments by which a record verb writes a chain's line, if the file is ours to write. */
function recordArguments(
  folder: Folder,
  chain: ChainRecord,
): Readonly<Record<keyof typeof NO_RECORD, string>> {
  const { standing, prefix } = folder;
  // Without root, what is there cannot be told by UUIDs.
  const left = folder.alone ? chain : withoutGone(chain, standing);
  const value = JSON.stringify(asWritten(left, standing, prefix));
  if (Buffer.byteLength(value) > RECORD_BYTES)
    throw new Failure(`${folder.id}: its record would be larger than ${RECORD_BYTES} bytes`);
  return folder.record.unreadable === null
    ? { header: RECORD_HEADER, key: recordKey(prefix), value }
    : NO_RECORD;
}

/** Whether two records say the same, in any order. */
export function sameRecord(a: ChainRecord, b: ChainRecord): boolean {
  const sorted = (chain: ChainRecord) =>
    JSON.stringify(Object.entries(chain).sort(([one], [other]) => (one < other ? -1 : 1)));
  return sorted(a) === sorted(b);
}

/** Writes a chain's record; `sync`: after all else there is on the disk. */
async function writeRecord(folder: Folder, chain: ChainRecord, sync = false): Promise<void> {
  const line = recordArguments(folder, chain);
  const given = { ...line, ...(sync ? { sync: "sync" } : {}) };
  if (line.header !== "")
    await askAt(folder, WRITE_RECORD, given, "cannot write .btrfs-backup.json");
}

/** Things in as few batches as hold them, of so much at most; a larger one is alone. */
function batchesOf<T>(all: readonly T[], sizeOf: (one: T) => number, most: number): T[][] {
  const batches: T[][] = [];
  let filled = Infinity;
  for (const one of all) {
    filled += sizeOf(one);
    if (filled > most) {
      batches.push([]);
      filled = sizeOf(one);
    }
    batches.at(-1)?.push(one);
  }
  return batches;
}

/** How many bytes of a command an argument takes. */
const argumentBytes = (word: string) => Buffer.byteLength(word) + 8;

/** Arguments in as few commands as hold them; there, each takes `extra` bytes more. */
const inArguments = (words: readonly string[], extra = 0) =>
  batchesOf(words, (word) => argumentBytes(word) + extra, RECORD_BYTES);

type Deletion = { readonly convertRw: boolean; readonly sync: boolean };

/**
 * Deletes subvolumes of a folder that still have their IDs (null where the ID is not known, and
 * nobody else comes). One command deletes as many as its arguments can hold.
 */
async function deleteFrom(
  folder: Folder,
  going: readonly { readonly name: string; readonly id: number | null }[],
  { convertRw, sync }: Deletion,
): Promise<void> {
  const idOf = new Map(going.map(({ name, id }) => [`./${name}`, id]));
  const batches = inArguments([...idOf.keys()], 12); // and the ID
  for (const names of batches) {
    const given = {
      convert: convertRw ? "rw" : "",
      top: folder.top,
      ids: names.flatMap((name) => idOf.get(name) ?? []).join(" "),
      names,
    };
    await askAt(folder, DELETE, given, `cannot delete ${plural(names.length, "subvolume")}`);
  }
  if (!sync || going.length === 0) return;
  const { held } = await freeNow(folder, "subvolumes");
  if (held.length > 0) log.warn(`${folder.id}: ${stillThere(held)}`);
}

/** Bytes that are free, and the IDs of the deleted subvolumes for which it was waited in vain. */
type Free = { readonly bytes: number; readonly held: readonly string[] };

/**
 * Bytes that are free where a folder is, once what was deleted there is gone if `cleaned` says so:
 * not the subvolumes of `staying`, and no longer than FREE waits. Errors: Failure.
 */
async function freeNow(
  folder: Folder,
  cleaned: "" | "subvolumes" | "files",
  staying: readonly string[] = [],
): Promise<Free> {
  const patience = Math.min(60, Math.ceil(LIMITS.stuck / 4000)); // s
  const given = { cleaned, patience: String(patience), staying: staying.join(" ") };
  const told = await askAt(folder, FREE, given, "cannot tell how much is free");
  const [, blocks, size, left = ""] = /^(\d+) (\d+) \d+((?: \d+)*)\n?$/.exec(told) ?? [];
  if (blocks === undefined)
    throw new Failure(`${folder.id}: cannot read what "stat -f" printed: ${told.slice(0, 100)}`);
  return { bytes: Number(blocks) * Number(size), held: left.split(" ").filter(Boolean) };
}

/** Why space does not become free. */
const stillThere = (held: readonly string[]) =>
  `${plural(held.length, "deleted subvolume")} (${held.length === 1 ? "ID" : "IDs"} ${held.join(", ")} of "btrfs subvolume list -d") ${held.length === 1 ? "does" : "do"} not go: somebody has a file or a directory open there ("lsof" tells who)`;

/** What stands at a destination, for planning. */
export type Standing = Readonly<{
  /** All that is complete, by any name: a transfer can build on it, and need not send it again. */
  held: readonly Entry[];
  /** The complete ones that are this source's and ours by name, which retention is about. */
  backups: readonly Backup[];
  /** By UUID, where backups were copied on to: the next copy builds on them. */
  copied: ReadonlyMap<string, string>;
  /** Names that a snapshot cannot get. */
  obstacles: ReadonlyMap<string, Obstacle>;
  /** Streams of other sources, which need all they build on. Null where backups need no other. */
  chained: readonly Entry[] | null;
  /** The UUID of the newest data, where `backups` are in the order of arrival, some belated. */
  newest?: string | undefined;
}>;

const OBSTACLES = {
  file: "something that is not a subvolume has that name",
  writable: "a writable subvolume has that name, which no transfer of this program began",
  edited: "the backup by that name was made writable",
  local: "a snapshot that was not received has that name",
  other: "a backup of other data has that name",
} as const satisfies Record<Conflict["obstacle"]["kind"], string>;

/** Why a snapshot is not sent, with the UUIDs that the data on both sides go by. */
export function conflictMessage({ snapshot, obstacle }: Conflict): string {
  const sides =
    "backup" in obstacle
      ? ` (UUID there: ${dataOf(obstacle.backup)}, here: ${dataOf(snapshot)})`
      : "";
  return `${snapshot.name} is not sent: ${OBSTACLES[obstacle.kind]}${sides}; rename or remove it`;
}

/** How a stream goes to a destination: `rate` in bytes a second; `protocol` null: btrfs's own. */
export type Sending = Filters &
  Readonly<{
    rate: number | null;
    protocol: string | null;
    fullEvery: FullEvery | null;
    resume: boolean;
    spaceCheck: boolean;
    trust: boolean;
  }>;

/** Whether an option of a destination changes the stream itself, as all get it who share it. */
const SHAPING = {
  level: true,
  protocol: true,
  rate: true,
  recipients: false,
  fullEvery: false, // changes the parent
  resume: false, // makes the stream a destination's own: `form` is null
  spaceCheck: false,
  trust: false,
} as const satisfies Record<keyof Sending, boolean>;
type Shaping = {
  [K in keyof Sending]: (typeof SHAPING)[K] extends true ? K : never;
}[keyof Sending];

/** How a stream is made. `chosen`: the protocol was not asked for. */
type Form = Pick<Sending, Shaping> & { readonly chosen?: boolean };

/** The key of a transfer's stream, by which transfers can share it; with `form` null, none does. */
export function streamKey(
  { snapshot, parent }: Transfer,
  { id, form }: Pick<Destination, "id" | "form">,
  source: Folder,
): string {
  const made = form(source);
  const shape = (Object.keys(SHAPING) as (keyof Sending)[]).filter((one) => SHAPING[one]);
  return JSON.stringify([
    snapshot.uuid,
    parent?.uuid,
    made === null ? id : shape.map((one) => made[one as Shaping]),
  ]);
}

/** The part of a broken transfer's stream that is over there: `bytes` of it, with a SHA-256. */
type Begun = Form & { readonly bytes: number; readonly sum: string };

/** Where a stream comes in. */
type Incoming = Readonly<{
  /** The last stages of its pipeline. */
  stages: readonly Stage[];
  environment?: Record<string, string>;
  /** Gets what was stored, and returns the bytes that are there. */
  finish?: (summed: Summed) => Promise<number>;
  /** What is there already. */
  kept?: Begun;
}>;

/** A place that backups go to, of any kind. */
export type Destination = Readonly<{
  id: string;
  standing: Standing;
  /** The last stream of a command, which cannot be asked what it has. Null for the others. */
  stream: { readonly last: Pin | null } | null;
  filesystem: string | null;
  /** Bytes that were free there when it was opened, and that it has in all. */
  free: number;
  size: number;
  /**
   * Whether a stream from there can take less than its data have. Without space for the data, a
   * destination that says no has none for the stream. Errors: Failure.
   */
  mayShrink: (source: Folder, transfer: Transfer) => Promise<boolean>;
  /**
   * Tells the bytes that are free now, with `settled` once what was deleted is gone; null where
   * nobody can tell. Errors: Failure.
   */
  measure: ((settled: boolean, staying?: readonly string[]) => Promise<Free>) | null;
  /** Why nothing may be deleted there in this run. */
  frozen: string | null;
  /** Null where each transfer has to look for a part to go on from. */
  form: (source: Folder) => Form | null;
  /** `isFollowed`: another transfer comes next, or else `settle`. Errors: Failure. */
  receive: (source: Folder, transfer: Transfer, isFollowed?: boolean) => Promise<Incoming>;
  /** Does what the last transfer left to the next one, where there was none. */
  settle?: () => Promise<void>;
  /** Writes down that nothing has changed since the newest one there; not everywhere it can be. */
  note?: (unchanged: Unchanged) => Promise<void>;
  /** Whether a snapshot's backup is the same as it; null where nobody can tell. Errors: Failure. */
  compare: ((source: Folder, snapshot: Snapshot) => Promise<boolean>) | null;
  /** What a snapshot's transfer has become there. */
  arrived: (transfer: Transfer) => Backup;
  /** Clears away what a failed transfer of that name left, but for a part to go on from. */
  discard: (name: string) => Promise<void>;
  /** Clears away all parts that a transfer could go on from. */
  tidy: () => Promise<void>;
  /** Deletes backups, in that order; `free`: waits until their space is free. */
  remove: (backups: readonly Backup[], free: boolean) => Promise<void>;
  close: () => Promise<void>;
}>;

/** What stands in a destination folder. `announced` names may be leftovers of broken transfers. */
export function standingIn(
  folder: Pick<Folder, "standing" | "snapshots" | "entries" | "prefix">,
  { strangers, destinations = [] }: ChainRecord,
  announced: readonly string[],
  elsewhere: readonly Entry[] = [],
): Standing {
  const foreign = new Set(strangers);
  const names = [...folder.entries].filter((name) => parseName(name, folder.prefix) !== null);
  return {
    held: [...folder.standing.filter(isComplete), ...elsewhere],
    backups: folder.snapshots.filter((one) => isComplete(one) && !foreign.has(one.uuid)),
    copied: new Map(destinations.map(({ pin, location }) => [pin?.uuid ?? "", location])),
    obstacles: new Map<string, Obstacle>([
      ...names.map((name) => [name, { kind: "file" }] as const),
      ...folder.snapshots.map((one) => [one.name, obstacleOf(one, announced)] as const),
    ]),
    chained: null,
  };
}

/** What a subvolume with a snapshot's name is, where it is not that snapshot's backup. */
function obstacleOf(backup: Backup, announced: readonly string[]): Obstacle {
  const isReceived = backup.receivedUuid !== null;
  if (backup.readonly) return { kind: isReceived ? "other" : "local", backup };
  // btrfs receive gives a received UUID, and makes read-only then: killed between, it leaves both
  // unlike.
  if (announced.includes(backup.name)) return { kind: "leftover" };
  return { kind: isReceived ? "edited" : "writable", backup };
}

/** For so long, in ms, a record need not say that a destination was served again. */
const SERVED_AGAIN_MS = 3600e3;

/** `again` looks anew; `owned`: the record from now on; `announced`: names that 0.3.1 began. */
type FolderOptions = Deletion &
  Readonly<{
    again: () => Promise<Folder>;
    owned: ChainRecord;
    announced: readonly string[];
    /** Complete backups in other folders of a tree that differences can be made against. */
    elsewhere: readonly Entry[];
    btrfsDebug: boolean;
    sending: Sending;
  }>;

/** Errors: Failure where zstd is missing. */
function needZstd({ zstd, host, hostName }: Pick<Folder, "zstd" | "host" | "hostName">): void {
  if (!zstd) throw new Failure(`${host.label || hostName}: zstd not found: install zstd`);
}

/** The level of a stream, which is compressed only between hosts. Errors: Failure without zstd. */
function compressionBetween(source: Folder, target: Folder, level: string): string {
  if (level === "" || sameHost(source.host, target.host)) return "";
  needZstd(source);
  needZstd(target);
  return level;
}

/** How a stream between folders is made: if none is asked for, with both sides' newest protocol. */
function formBetween(
  source: Folder,
  target: Folder,
  { level, rate, protocol }: Pick<Sending, Shaping>,
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

/** How a folder receives a stream. */
type Receiving = Readonly<{
  level: string;
  /** The folder's record, into which the announcement is written meanwhile; null for none. */
  chain: ChainRecord | null;
  btrfsDebug: boolean;
  /** The file that it was kept in. */
  part?: Part | undefined;
  isChecked?: boolean;
  isFollowed?: boolean;
}>;

/** The receiving end of a transfer into a folder. */
function receiveStage(folder: Folder, name: string, how: Receiving): Stage {
  const { level, chain, btrfsDebug, part, isChecked, isFollowed } = how;
  const { header, key, value } = chain === null ? NO_RECORD : recordArguments(folder, chain);
  // A checked stream comes from us, and not from the file that it was kept in.
  const flag = `${btrfsDebug ? "-vv" : "-q"}${isChecked && part !== undefined ? "C" : ""}`;
  const followed = isFollowed ? { sync: "next" } : {};
  const given = {
    flag,
    ...at(folder),
    level,
    holder: holderOf(folder),
    prefix: folder.prefix,
    header,
    key,
    beginning: announcement(name, folder),
    rest: value.slice(1),
    ...(chain === null ? { sync: "later" } : followed),
    ...part,
  };
  const more = { receives: true, shown: btrfsDebug };
  return verbStage("btrfs receive", folder.host, RECEIVE, given, more);
}

/**
 * The receiving end of a stream that another host or a store made, uncompressed and read here,
 * before any `btrfs receive` of ours gets it. `end`: that receive, of a stream that is compressed
 * by a level. Errors: Failure where zstd is missing.
 */
function checkedReceive(
  target: Folder,
  level: string,
  { name, uuid, parent }: Omit<Expected, "alone">,
  end: (level: string) => Stage,
): Stage[] {
  const isElsewhere = target.host.ssh !== null;
  if (level !== "" && which.sync("zstd", { nothrow: true }) === null)
    throw new Failure("zstd not found: install zstd");
  const zstd = (options: string): Stage[] =>
    level === "" ? [] : [{ label: "zstd", command: `zstd -q ${options}` }];
  return [
    ...zstd("-d -c"),
    relayStage({ check: { name, uuid, parent, alone: !target.fenced } }),
    ...(isElsewhere ? zstd(`-c -T2 -${level}`) : []),
    end(isElsewhere ? level : ""),
  ];
}

/** What a stream of a snapshot must say of itself. */
const expected = (source: Folder, { snapshot, parent }: Transfer): Omit<Expected, "alone"> => ({
  name: snapshot.name,
  uuid: source.alone ? "" : dataOf(snapshot),
  parent: parent && dataOf(parent),
});

/** Whether a source's stream must be checked where it arrives, since another host made it. */
function mustBeChecked(source: Folder, target: Folder, { trust }: Pick<Sending, "trust">): boolean {
  const isForeign = source.host.ssh !== null && !sameHost(source.host, target.host);
  if (isForeign && trust)
    log.info(`${source.id}: its stream is received as it is, by --trust-stream`);
  return isForeign && !trust;
}

/** The file that a stream was kept in: name without dot and end, and its contents: see COMPLETE. */
type Part = Readonly<{
  part: string;
  sum: string;
  bytes: string;
  kept: string;
}>;

const PART = /\.p([0-2])-(\d*)\.part$/;

/** A stream that is kept as a file until it is whole. `copies`: how often its data are there. */
type Resumable = Readonly<{
  source: Folder;
  transfer: Transfer;
  object: string;
  copies: number;
  sending: Sending;
}>;

/**
 * Keeps a stream as a file over there until it is whole, so that a later transfer can go on from
 * the part that arrived. `received` gets the file, and the level of its compression. Errors:
 * NoSpace if that clearly takes more than there is.
 */
async function keptWhole(
  folder: Folder,
  { source, transfer, object, copies, sending }: Resumable,
  received: (part: Part, level: string) => Promise<unknown>,
): Promise<Incoming> {
  const { host, prefix, id, place } = folder;
  const { name } = transfer.snapshot;
  const kept = await keptOf(folder, object, sending);
  const size = await streamBytes(source, transfer);
  const needed = Math.max(0, copies * size - kept.bytes);
  log.info(
    `${id}: ${kept.bytes > 0 ? `${inBytes(kept.bytes)} of ${name} are there already; ` : ""}the stream of some ${inBytes(size)} is kept there until it is whole, which takes ${inBytes(needed)} of ${inBytes(place.free)}`,
  );
  if (sending.spaceCheck && needed > place.free)
    throw new NoSpace(
      `${name} takes ${inBytes(needed)} there with --resume, and only ${inBytes(place.free)} are free; --skip-space-check tries all the same`,
    );
  const part = `${object}.p${kept.protocol ?? "0"}-${kept.level}`;
  const given = { lock: prefix, object: part, holder: holderOf(folder), size: String(kept.bytes) };
  return {
    kept,
    stages: [
      relayStage({ sum: true }),
      verbStage("storing", host, RAW.store, { ...at(folder), ...given }),
    ],
    async finish({ sum, bytes }) {
      const all = kept.bytes + bytes;
      await received({ part, sum, bytes: String(all), kept: String(kept.bytes) }, kept.level);
      return all;
    },
  };
}

/** The part of a stream that is kept in a folder; if none is, of 0 bytes and as `sending` says. */
async function keptOf(folder: Folder, object: string, sending: Sending): Promise<Begun> {
  const { prefix } = folder;
  const found = await askAt(folder, KEPT, { prefix, object }, "cannot look for what is kept");
  const [, bytes = 0, sum = "", name = ""] =
    /^(\d+) ([0-9a-f]{64})  - \.\/\.(.*)$/m.exec(found) ?? [];
  const [, protocol = sending.protocol, level = sending.level] = PART.exec(name) ?? [];
  const form = { level, rate: sending.rate, protocol: protocol === "0" ? null : protocol };
  return { ...form, bytes: Number(bytes), sum };
}

/** Whether a transfer can break and be gone on with: it goes over ssh. */
const canResume = (source: Folder, { host }: Folder, { resume }: Sending) =>
  resume && (source.host.ssh !== null || host.ssh !== null);

/** Removes the kept parts of broken transfers, if a listing or this run knows of any. */
async function tidyUp(folder: Folder, hasParts: boolean): Promise<void> {
  const { prefix, entries } = folder;
  if (hasParts || [...entries].some((name) => PART.test(name)))
    await askAt(folder, TIDY, { prefix }, "cannot remove what is kept of a broken transfer");
}

/**
 * The SHA-256 of all that a stream would carry of a snapshot, and about how many bytes that was.
 * Errors: Failure.
 */
async function digestIn(folder: Folder, { name }: Entry): Promise<Summed> {
  const problem = `cannot read ${name}`;
  const told = await askAt(folder, DIGEST, { snapshot: name }, problem);
  const [sum] = /^[0-9a-f]{64}(?= )/m.exec(told) ?? [];
  const [, bytes] = /^bytes (\d+)$/m.exec(told) ?? []; // an older guard does not count
  return {
    sum: sum ?? failWith(`${folder.id}: ${problem}: no SHA-256 was printed`),
    bytes: Number(bytes ?? 0),
  };
}

/** Errors: Failure. */
function failWith(message: string): never {
  throw new Failure(message);
}

/** Waits for all, also where one fails. Errors: the first one's. */
const allOf = async <T>(all: readonly Promise<T>[]): Promise<T[]> =>
  (await Promise.allSettled(all)).map((one) => resultOf(one));

/** What transfers of this run have changed in a destination folder. */
type FolderState = {
  /** Its record, without the announcement of what is being received. */
  chain: ChainRecord;
  /** The UUIDs that data there go by. */
  readonly here: Set<string | null>;
  /** A stream was kept there. */
  hasParts: boolean;
  /** The record on the disk has an announcement that the next transfer, or `settle`, takes out. */
  isAnnounced: boolean;
};

/** Whether a folder's backup of a snapshot has its contents, read on both sides. Errors: Failure. */
async function sameContent(folder: Folder, source: Folder, snapshot: Snapshot): Promise<boolean> {
  const backup = dataFinder(folder.standing.filter(isComplete))(snapshot);
  if (backup === undefined) throw new Failure(`${folder.id} has no backup of ${snapshot.name}`);
  const sides = [digestIn(source, snapshot), digestIn(folder, backup)];
  const [ours, theirs] = (await allOf(sides)) as [Summed, Summed];
  return ours.sum === theirs.sum;
}

/** A btrfs folder as a destination. */
function folderDestination(folder: Folder, options: FolderOptions): Destination {
  const { host, prefix, id, place, standing } = folder;
  const { owned, announced, sending } = options;
  const { receiving: left, since: _, ...chain } = owned;
  const doubted = doubtedIn(folder);
  const here = new Set(standing.map(({ receivedUuid }) => receivedUuid));
  const state: FolderState = { chain, here, hasParts: false, isAnnounced: false };
  return {
    id,
    stream: null,
    filesystem: place.filesystem,
    free: place.free,
    size: place.size,
    mayShrink: (from, transfer) => shrinksIn(folder, sending, from, transfer),
    measure: (settled, staying) => freeNow(folder, settled ? "subvolumes" : "", staying),
    standing: standingIn(
      folder,
      chain,
      left === undefined ? announced : [...announced, left],
      options.elsewhere,
    ),
    frozen:
      folder.record.unreadable === null
        ? null
        : `its .btrfs-backup.json cannot be read (${folder.record.unreadable}); move it aside and run once with --adopt`,
    form: (source) =>
      canResume(source, folder, sending) ? null : formBetween(source, folder, sending),
    receive(source, transfer, isFollowed = false) {
      // A guarded key has to take its announcement back.
      state.isAnnounced = isFollowed && host.ssh === null;
      return receiveInto(folder, state, options, { source, transfer });
    },
    compare: (source, snapshot) => sameContent(folder, source, snapshot),
    arrived(transfer) {
      here.add(dataOf(transfer.snapshot));
      return { ...backupOf(transfer), id: ARRIVED };
    },
    async settle() {
      if (state.isAnnounced) await writeRecord(folder, state.chain, true);
      state.isAnnounced = false;
    },
    note: (unchanged) => noteInRecord(folder, state, unchanged),
    tidy: () => tidyUp(folder, state.hasParts),
    async discard(name) {
      const how = doubted.has(name) ? "whole" : "";
      const asked = { prefix, name, ...recordArguments(folder, state.chain), how };
      const problem = `cannot remove what the broken transfer of ${name} left`;
      await askAt(folder, DISCARD, asked, problem);
    },
    async remove(backups, free) {
      const going = await withIds(backups, options.again);
      await deleteFrom(folder, going, { ...options, sync: options.sync || free });
    },
    close: folder.close,
  };
}

/** Writes into a folder's record that nothing had changed, if it says no such thing of the last hour. */
async function noteInRecord(
  folder: Folder,
  state: FolderState,
  unchanged: Unchanged,
): Promise<void> {
  const before = folder.chain.unchanged;
  const isSoon =
    before?.uuid === unchanged.uuid &&
    Date.parse(unchanged.at) - Date.parse(before.at) < SERVED_AGAIN_MS;
  if (isSoon || folder.record.unreadable !== null) return;
  state.chain = { ...state.chain, unchanged };
  await writeRecord(folder, state.chain);
}

/** Whether a place's filesystem compresses what is written to it, or may do so. */
function writesLess({ mounts, place: { path } }: Pick<Folder, "mounts" | "place">): boolean {
  return mounts.length === 0 || placeOn(mounts, path).mount.compresses === true;
}

/**
 * Whether a received stream can take less than its data: the place compresses them, or they come
 * compressed (protocol 2). Errors: Failure.
 */
async function shrinksIn(
  folder: Folder,
  sending: Sending,
  source: Folder,
  { snapshot }: Transfer,
): Promise<boolean> {
  if (writesLess(folder)) return true;
  const problem = "cannot tell whether anything is compressed there";
  if ((await askAt(folder, COMPRESSED, { snapshot: "" }, problem)) !== "") return true;
  if (formBetween(source, folder, sending).protocol !== "2") return false;
  return (await askAt(source, COMPRESSED, { snapshot: snapshot.name }, problem)) !== "";
}

/** How a folder gets a transfer: by `btrfs receive` at once, or by way of a file that is kept. */
async function receiveInto(
  folder: Folder,
  state: FolderState,
  { sending, btrfsDebug }: FolderOptions,
  { source, transfer }: Pick<Resumable, "source" | "transfer">,
): Promise<Incoming> {
  const form = formBetween(source, folder, sending);
  const isChecked = mustBeChecked(source, folder, sending);
  state.chain = withBelated(state, transfer);
  const stages = (given: string, part?: Part) => {
    const end = (level: string) => {
      const { chain, isAnnounced: isFollowed } = state;
      const how = { level, chain, btrfsDebug, part, isChecked, isFollowed };
      return receiveStage(folder, transfer.snapshot.name, how);
    };
    return isChecked
      ? checkedReceive(folder, given, expected(source, transfer), end)
      : [end(given)];
  };
  if (!canResume(source, folder, sending)) return { stages: stages(form.level) };
  state.hasParts = true;
  const owner = ownerOf(state.chain.owner as SourceIdentity);
  const object = streamName(transfer, owner, { level: "", recipients: [] });
  const kept = { source, transfer, object, copies: 2, sending: { ...sending, ...form } };
  return keptWhole(folder, kept, (part, level) => {
    const objects = [`.${part.part}.part`];
    const given = { ...at(folder), how: "", holder: holderOf(folder), objects };
    const reading = () => verbStage("reading", folder.host, RAW.fetch, given, { sends: true });
    return pipeline([...(isChecked ? [reading()] : []), ...stages(level, part)]);
  });
}

/** A folder's record, which names the belated backups there, once a transfer has arrived. */
function withBelated({ chain, here }: FolderState, { snapshot, belated }: Transfer): ChainRecord {
  if (!belated && chain.belated === undefined) return chain;
  const data = dataOf(snapshot);
  const others = (chain.belated ?? []).filter((uuid) => uuid !== data && here.has(uuid));
  return { ...chain, belated: [...others, ...(belated ? [data] : [])] };
}

/** The ID of a backup that has arrived in this run: see withIds. */
const ARRIVED = -1;

/** Backups with their IDs; `again` looks for those of what has arrived in this run. */
async function withIds(
  backups: readonly Backup[],
  again: () => Promise<Folder>,
): Promise<readonly Entry[]> {
  if (!backups.some(({ id }) => id === ARRIVED)) return backups;
  const standing = (await again()).standing.filter(isComplete);
  const found = new Map(standing.map((entry) => [dataOf(entry), entry]));
  return backups.map((one) => (one.id === ARRIVED ? (found.get(dataOf(one)) ?? one) : one));
}

/** A snapshot as the backup that its transfer makes. */
const backupOf = ({ snapshot, belated }: Pick<Transfer, "snapshot" | "belated">): Backup => {
  const { kept: _, ...sent } = snapshot; // at the source only
  return { ...sent, receivedUuid: dataOf(snapshot), ...(belated ? { belated } : {}) };
};

/**
 * gpg(1) as we use it: neither a configuration file nor a signature makes it ask the network for a
 * key, or add a reader.
 */
const GPG =
  "gpg --batch --no-tty --quiet --no-auto-key-locate --no-auto-key-retrieve --disable-dirmngr";

/**
 * Encrypts for gpg's recipients, if there are any. gpg compresses nothing: that was done before, or
 * is not worth it.
 */
const encrypting = ({ recipients }: Filters): Stage[] =>
  recipients.length === 0
    ? []
    : [
        {
          label: "gpg",
          command: `${GPG} --no-encrypt-to --trust-model always --compress-algo none --encrypt${recipients.map((one) => ` --recipient ${keyOf(one)}`).join("")}`,
        },
      ];

const knownKeys = new Map<string, string>();
/** The fingerprint of the one key that a recipient means. Errors: Failure for none, or several. */
function keyOf(recipient: string): string {
  const known = knownKeys.get(recipient);
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
  knownKeys.set(recipient, first);
  return first;
}

/**
 * The fingerprints of keys that can encrypt and are neither expired nor revoked nor disabled, in
 * the output of `gpg --with-colons --list-keys` (doc/DETAILS of GnuPG: the validity is the second
 * field, the capabilities of the whole key are capitals in the twelfth).
 */
export function usableKeys(listed: string): string[] {
  const found: string[] = [];
  let usable = false;
  for (const line of listed.split("\n")) {
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

/** Errors: Failure if a stream of that source is to be compressed or encrypted, and cannot be. */
function checkFilters(
  source: Pick<Folder, "zstd" | "host" | "hostName">,
  { level, recipients }: Filters,
): void {
  if (level !== "") needZstd(source);
  if (recipients.length > 0 && which.sync("gpg", { nothrow: true }) === null)
    throw new Failure("gpg not found: install gnupg");
  for (const recipient of recipients) keyOf(recipient);
}

/** How a stored stream is made: to be read for long, so by default in btrfs send's own protocol. */
const storedForm = ({ level, rate, protocol }: Sending): Form => ({ level, rate, protocol });

/** What stands in a store, for a source that owns the streams of some lineages. */
function standingInStore(
  { streams, debris }: Store,
  prefix: string,
  lineages: ReadonlySet<string>,
): Standing {
  const held = streams.filter(isComplete);
  const isOurs = ({ owner }: Stream) => lineages.has(owner.lineage);
  const names = [...debris.keys()].filter((name) => parseName(name, prefix) !== null);
  return {
    held,
    backups: snapshotsAmong(held.filter(isOurs), prefix, null),
    copied: new Map(),
    obstacles: new Map(names.map((name) => [name, { kind: "leftover" }])),
    chained: held.filter((one) => !isOurs(one)),
  };
}

/** A place where streams are stored. */
type StoreTarget = Folder &
  Readonly<{
    store: Store;
    /** Its source, as names of streams say it. */
    owner: StreamOwner;
    /** What its verbs lock: a chain's prefix; for a remote, which nothing can lock, a file. */
    lock: string;
    sending: Sending;
  }>;

/** `again` lists the store anew; `lock`: the file for a remote. */
type StoreOptions = Pick<StoreTarget, "store" | "owner" | "lock" | "sending"> &
  Readonly<{ again: () => Promise<Folder>; standing: Standing }>;

/** Stored streams as a destination. */
function storeDestination(
  folder: Folder,
  { again, standing, ...options }: StoreOptions,
): Destination {
  const { store, owner, sending } = options;
  const { isDirectory: isLockable } = store.verbs;
  const target = { ...folder, ...options, lock: isLockable ? folder.prefix : options.lock };
  const inSource = dataFinder(standing.held);
  const objects = new Map<string, string>();
  const nameOf = (transfer: Transfer) => streamName(transfer, owner, sending);
  const resumes = (source: Folder) => isLockable && canResume(source, folder, sending);
  let hasParts = false;
  return {
    id: folder.id,
    stream: null,
    filesystem: null,
    free: folder.place.free,
    size: folder.place.size,
    mayShrink: async () => {
      const { level, recipients, protocol } = sending;
      // gpg compresses as well.
      return level !== "" || recipients.length > 0 || protocol === "2" || writesLess(folder);
    },
    measure: isLockable ? (settled) => freeNow(folder, settled ? "files" : "") : null,
    standing,
    frozen: lostSums(store, folder.prefix),
    form: (source) => (resumes(source) ? null : storedForm(sending)),
    async receive(source, transfer) {
      checkFilters(source, sending);
      const object = nameOf(transfer);
      if (!resumes(source)) return upload(target, source, transfer, object);
      hasParts = true;
      const kept = { source, transfer, object, copies: 1, sending };
      return keptWhole(folder, kept, (part) => commitStream(target, object, part));
    },
    compare: null,
    arrived(transfer) {
      const { snapshot, parent } = transfer;
      const object = nameOf(transfer);
      objects.set(snapshot.uuid, object);
      const parentUuid = parent && (objects.get(parent.uuid) ?? inSource(parent)?.uuid ?? null);
      return { ...backupOf(transfer), uuid: object, parentUuid };
    },
    async discard(name) {
      const debris = (await again()).store?.debris.get(name) ?? [];
      await dropObjects(
        target,
        debris.filter((object) => !sending.resume || !PART.test(object)),
      );
    },
    tidy: () => tidyUp(folder, hasParts),
    remove: (backups) =>
      dropObjects(
        target,
        backups.flatMap(({ uuid }) => [uuid, uuid + SUM]),
      ),
    close: folder.close,
  };
}

/** How a store gets a stream that is not kept in part. */
async function upload(
  target: StoreTarget,
  source: Folder,
  transfer: Transfer,
  object: string,
): Promise<Incoming> {
  const { store, lock, sending, host } = target;
  const { verbs } = store;
  const size = verbs.isDirectory ? "" : await partFor(source, transfer, store, sending);
  const given = { ...at(target), lock, object, holder: holderOf(target), size };
  const put = verbStage(verbs.called, host, verbs.store, given);
  return {
    stages: [...encrypting(sending), relayStage({ sum: true }), put],
    async finish({ sum, bytes }) {
      await commitStream(target, object, { sum, bytes: String(bytes) });
      return bytes;
    },
  };
}

/** Makes a stream that has arrived complete. */
async function commitStream(
  target: StoreTarget,
  object: string,
  stored: Pick<Part, "sum" | "bytes"> & Partial<Part>,
): Promise<void> {
  const { store, lock } = target;
  const given = { lock, object, ...stored };
  await askAt(target, store.verbs.commit, given, `cannot complete ${object}`);
}

/** Why nothing may be deleted from a store: checksum objects seem to be lost; null otherwise. */
function lostSums(store: Store, prefix: string): string | null {
  const [first, ...more] = store.unsummed.filter(({ name }) => parseName(name, prefix) !== null);
  if (first === undefined) return null;
  return `${plural(more.length + 1, "stream")} there ${more.length === 0 ? "has" : "have"} no checksum object, first ${first.uuid}: if these were lost, make them again (see "btrfs-backup help stores"), else delete the streams`;
}

/**
 * Deletes objects of a store, streams first: a checksum object alone is only debris, a stream alone
 * counts as lost.
 */
async function dropObjects(target: StoreTarget, going: readonly string[]): Promise<void> {
  const { store, lock } = target;
  const isSum = (object: string) => object.endsWith(SUM);
  const ordered = [going.filter((one) => !isSum(one)), going.filter(isSum)];
  for (const objects of ordered.flatMap((all) => inArguments(all))) {
    const problem = `cannot delete ${plural(objects.length, "object")}`;
    await askAt(target, store.verbs.drop, { lock, objects }, problem);
  }
}

const MIB = 2 ** 20;
const S3_OBJECT = 5 * 2 ** 40; // bytes; in at most 10,000 parts: the limits of S3

/**
 * How large the parts are in which S3 gets a stream of about that many bytes. Errors: Failure if no
 * object of S3 can be that large.
 */
export function partSize(bytes: number): number {
  if (bytes > S3_OBJECT)
    throw new Failure(
      `the stream would have some ${inBytes(bytes)}, and an object of S3 at most ${inBytes(S3_OBJECT)}`,
    );
  // The estimate does not count every byte, and filters can add some.
  return Math.max(16 * MIB, Math.ceil((bytes * 1.05 + 64 * MIB) / 10_000 / MIB) * MIB);
}

// ── estimates: how much a transfer takes ──

/**
 * What a stream will have: its bytes, but for some hundred a command; of these the data that take
 * space of their own, which are no less than it says where nothing compresses them. `compressing`: files in it are compressed
 * wherever they are received.
 */
export type Estimate = {
  readonly bytes: number;
  readonly data: number;
  readonly compressing: boolean;
};

/** Less than so many bytes of a file can be kept with what is known of it, and need no block. */
const OWN_BLOCK = 4096;

/**
 * The stream of which `estimate` printed this; a command without data counts 200 bytes. Errors:
 * Failure for any other shape.
 */
export function parseEstimate(text: string): Estimate {
  const lines = text
    .split("\n")
    .filter(Boolean)
    .map((line) => /^ *(\d+) (?: len=(\d+)|([a-z_]+))$/.exec(line));
  const isFirst = (line: RegExpExecArray | null) => /^(subvol|snapshot)$/.test(line?.[3] ?? "");
  if (lines.includes(null) || !lines.some(isFirst))
    throw new Failure(`"btrfs receive --dump" printed something unknown: ${text.slice(0, 200)}`);
  const sum = (all: readonly (RegExpExecArray | null)[], each: number) =>
    all.reduce((before, line) => before + Number(line?.[1]) * Number(line?.[2] ?? each), 0);
  const data = lines.filter((line) => Number(line?.[2] ?? 0) >= OWN_BLOCK);
  return {
    bytes: sum(lines, 200),
    data: sum(data, 0),
    compressing: lines.some((line) => line?.[3] === "compressing"),
  };
}

/** Estimates that were made, by snapshot and the parent's UUID. */
const estimates = new WeakMap<Snapshot, Map<string, Estimate>>();

const knownEstimate = ({ snapshot, parent }: Transfer): Estimate | undefined =>
  estimates.get(snapshot)?.get(parent?.uuid ?? "");

/** Keeps what is known of a transfer's stream. */
function noteEstimate({ snapshot, parent }: Transfer, estimate: Estimate): Estimate {
  const known = estimates.get(snapshot) ?? new Map<string, Estimate>();
  estimates.set(snapshot, known.set(parent?.uuid ?? "", estimate));
  return estimate;
}

const estimateAsked = ({ snapshot, parent }: Transfer) => ({
  snapshot: snapshot.name,
  parent: parent ? fromFolder(parent) : "",
});

/** What a transfer's stream will have. Errors: Failure. */
async function estimateOf(source: Folder, transfer: Transfer): Promise<Estimate> {
  const known = knownEstimate(transfer);
  if (known !== undefined) return known;
  const problem = `cannot estimate the stream of ${transfer.snapshot.name}`;
  const told = await askAt(source, ESTIMATE, estimateAsked(transfer), problem);
  return noteEstimate(transfer, parseEstimate(told));
}

/** How many bytes a stream will have, but for some hundred a command. Errors: Failure. */
const streamBytes = async (source: Folder, transfer: Transfer): Promise<number> =>
  (await estimateOf(source, transfer)).bytes;

/** An estimate beside the transfer that it is about. */
type Beside = Readonly<{
  /** Begins it, unless there is one. */
  begin: () => void;
  /** The bytes, as soon as they are known. */
  size: () => number | undefined;
  /** Ends it: nothing can be deleted while `btrfs send` has it. */
  end: () => Promise<void>;
}>;

/** For that long the process of an estimate on another host may still be there; in ms. */
const BEAT = 1500;

/** How large a stream is, asked while it flows, by a process that yields to all others. */
function besideTransfer(source: Folder, transfer: Transfer): Beside {
  let work: { readonly stop: () => void; readonly ended: Promise<boolean> } | null = null;
  const begin = () => {
    if (work !== null || source.alone || knownEstimate(transfer) !== undefined) return;
    const given = { ...at(source), ...estimateAsked(transfer), idle: "yes" };
    const { process: child, stop } = start(source.host, ESTIMATE, given);
    child.stdin.end("");
    const close = () => {
      stop();
      child.stdout.destroy(); // whatever it is that we cannot kill notices that
    };
    running.add(close);
    const estimated = async () => {
      const { exitCode, stdout } = await child;
      running.delete(close);
      if (exitCode === 0) noteEstimate(transfer, parseEstimate(stdout));
      return exitCode === 0;
    };
    work = { stop: close, ended: estimated().catch(() => false) };
  };
  return {
    begin() {
      try {
        begin();
      } catch (error) {
        log.debug(messageOf(error)); // without it, there is only no percentage
      }
    },
    size: () => knownEstimate(transfer)?.bytes,
    async end() {
      if (work === null) return;
      const { stop, ended } = work;
      if (await isOverWithin(0, ended)) return;
      stop();
      const isOver = await isOverWithin(LIMITS.parting, ended);
      const { ssh, sudo } = source.host;
      const mayLive = isOver && (ssh !== null || sudo) && !(await ended);
      if (mayLive) await new Promise((later) => setTimeout(later, BEAT));
    },
  };
}

/**
 * What a transfer takes whose snapshot a dry run has not taken: what has come to SOURCE since the
 * parent. Errors: Failure.
 */
async function growthOf({ host, source }: Folder, transfer: Transfer): Promise<Estimate> {
  const { parent, snapshot } = transfer;
  const problem = `cannot estimate the stream of ${snapshot.name}`;
  if (source === null || (parent !== null && parent.cgen === undefined))
    throw new Failure(`${problem}: it is not known what it begins with`);
  const generation = String(parent?.cgen ?? 0);
  return noteEstimate(
    transfer,
    parseEstimate(await ask(host, GROWN, { source: source.path, generation }, problem)),
  );
}

/** The part size for a transfer to a remote, as rclone reads it. */
async function partFor(
  source: Folder,
  transfer: Transfer,
  { type }: Store,
  { level }: Sending,
): Promise<string> {
  const bytes = await streamBytes(source, transfer);
  log.debug(`the stream of ${transfer.snapshot.name} will have some ${inBytes(bytes)}`);
  // A compressed stream can be much smaller, and other remotes are not bound by the limits of S3.
  return `${partSize(type === "s3" && level === "" ? bytes : Math.min(bytes, S3_OBJECT)) / MIB}M`;
}

/** The shell for the user's commands, with pipefail if it can: else, a part can fail unseen. */
async function commandShell(report: Report): Promise<string> {
  if (which.sync("bash", { nothrow: true }) !== null) return "bash -o pipefail";
  if ((await shell`${"sh -o pipefail -c :"}`).exitCode === 0) return "sh -o pipefail";
  report.warning(
    "there is no bash, and this sh has no pipefail: a failure inside of a shell:// command's pipeline may not be noticed",
  );
  return "sh";
}

/**
 * `interpreter`: see commandShell; `lock`: the file that a command locks, so that a killed run's
 * and the next one never store side by side.
 */
type ShellOptions = Readonly<{
  last: Pin | null;
  interpreter: string;
  lock: string;
  prefix: string;
  source: string;
  /** The path of a tree's member. */
  below: string;
  sending: Sending;
}>;

/** A command as a destination: a store that can only take. */
function shellDestination(
  { id, command }: Location & { kind: "shell" },
  { last, interpreter, lock, prefix, source: sourceId, below, sending }: ShellOptions,
): Destination {
  const file = quote(lock);
  return {
    id,
    stream: { last },
    filesystem: null,
    free: Infinity,
    size: Infinity,
    mayShrink: async () => true,
    measure: null,
    standing: { held: [], backups: [], copied: new Map(), obstacles: new Map(), chained: null },
    frozen: null,
    form: () => storedForm(sending),
    async receive(source, { snapshot, parent }) {
      checkFilters(source, sending);
      const locked = `{ [ -f ${file} ] || ( umask 077; exec dd if=/dev/null of=${file} conv=excl oflag=nofollow status=none 2>/dev/null ) || :; [ -f ${file} ] || exit 75; flock -n -o -E 75 ${file} ${interpreter} -c ${quote(command)}; }`;
      return {
        stages: [...encrypting(sending), { label: id, command: locked, typed: command }],
        environment: {
          BTRFS_BACKUP_NAME: snapshot.name,
          BTRFS_BACKUP_KIND: parent === null ? "full" : "incremental",
          BTRFS_BACKUP_PARENT: parent?.name ?? "",
          BTRFS_BACKUP_UUID: snapshot.uuid,
          BTRFS_BACKUP_PARENT_UUID: parent?.uuid ?? "",
          BTRFS_BACKUP_PREFIX: prefix,
          BTRFS_BACKUP_SOURCE: sourceId,
          BTRFS_BACKUP_PATH: below,
          BTRFS_BACKUP_SUFFIX: suffixOf(sending),
        },
      };
    },
    compare: null,
    arrived: backupOf,
    discard: async () => {},
    tidy: async () => {},
    remove: async () => {},
    close: async () => {},
  };
}

// ── 6. Plan ──────────────────────────────────────────────────────────────────────────────
// Pure functions: whatever is sent or deleted was decided here.

/** A snapshot with the reasons to keep it; without any, it goes. */
export type Decision<T extends NamedTime> = {
  readonly entry: T;
  readonly reasons: readonly string[];
};

const keptBy = <T extends NamedTime>(decisions: readonly Decision<T>[]) =>
  decisions.filter(({ reasons }) => reasons.length > 0).map(({ entry }) => entry);

/** What retention goes by. `now`: wall-clock ms; `adopted`: names the clock rightly leapt to. */
type Retention = Readonly<{
  policy: Policy | null;
  now: number;
  adopted?: readonly string[] | undefined;
}>;

/**
 * Why a policy keeps each of `entries` (oldest first). Calendar words keep the first of a period,
 * so that an entry that is kept stays so for its whole life. `now` is wall-clock ms: windows like
 * `14d+` end at the newest entry, or now if that is dated in the future.
 */
export function retain<T extends NamedTime>(
  entries: readonly T[],
  policy: Policy | null,
  now: number,
): Decision<T>[] {
  const reasons = entries.map(() => [] as string[]);
  const newest = entries.at(-1);
  const words = (most: number, unit: Unit) => `${most === Infinity ? "*" : most}${unit}`;
  reasons.at(-1)?.push("newest");
  if (policy === null) for (const why of reasons) why.push("everything is kept");
  else if (newest !== undefined) {
    const last = policy.newest > 0 ? reasons.slice(-policy.newest) : [];
    for (const why of last) why.push(`one of the newest ${policy.newest}`);
    for (const { unit, count: most } of policy.firstOf) {
      const firsts = new Map<number, number>();
      entries.forEach(
        ({ time }, i) => firsts.has(periodOf(time, unit)) || firsts.set(periodOf(time, unit), i),
      );
      for (const i of [...firsts.values()].slice(-most))
        reasons[i]?.push(`first of its ${UNITS[unit].noun} (${words(most, unit)})`);
    }
    for (const { unit, count: most } of policy.within) {
      const from = momentBefore(Math.min(now, newest.time), most, unit);
      entries.forEach(
        ({ time }, i) => time >= from && reasons[i]?.push(`within ${words(most, unit)}`),
      );
    }
  }
  return entries.map((entry, i) => ({ entry, reasons: reasons[i] ?? [] }));
}

/** How far a clock may go: forward with nothing taken meanwhile, back by the widest zone change. */
const LEAP = { forward: 30 * DURATION.d, times: 10, back: 26 * DURATION.h };

/**
 * Where the clock leapt, by the times of entries in the order in which they were taken. It leapt
 * forward to a time more than 30 days, and more than ten times the longest time between others
 * until then, after the newest before; back, to one more than 26 hours before the last.
 */
export function leapsAmong(entries: readonly NamedTime[]): number[] {
  const leaps: number[] = [];
  let [newest, longest] = [entries[0]?.time ?? 0, 0];
  for (let i = 1; i < entries.length; i++) {
    const { time } = entries[i] as NamedTime;
    const ahead = time - newest;
    const isForward = ahead > LEAP.forward && ahead > LEAP.times * longest;
    if (isForward || time < (entries[i - 1] as NamedTime).time - LEAP.back) leaps.push(i);
    longest = Math.max(longest, ahead);
    newest = Math.max(newest, time);
  }
  return leaps;
}

/**
 * How many different days it takes to believe a clock again, and how many entries from before it
 * leapt stay then at first.
 */
const BELIEVED = { days: 3, stay: 3 };
const LEAPT = "the clock leapt: ";

/**
 * Retention that keeps whatever only a wrong clock would let go by hours to years. Nothing goes
 * until there are entries of three days since the clock leapt, and in the deletion then, the three
 * newest from before stay.
 */
function retained<T extends NamedTime>(
  entries: readonly T[],
  { policy, now, adopted = [] }: Retention,
): Decision<T>[] {
  const decisions = retain(entries, policy, now);
  const byTime = policy === null ? 0 : policy.firstOf.length + policy.within.length;
  const reasons = decisions.map((decision) => [...decision.reasons]);
  for (const leap of byTime === 0 ? [] : leapsAmong(entries)) {
    const { name } = entries[leap] as T;
    const days = new Set(entries.slice(leap).map(({ time }) => periodOf(time, "d"))).size;
    const isBelieved = days >= BELIEVED.days || adopted.includes(name);
    const older = reasons.slice(0, Math.max(0, leap - BELIEVED.stay));
    const isFirst = days <= BELIEVED.days || older.some((why) => why.length === 0);
    const why = isBelieved
      ? `one of the newest ${BELIEVED.stay} from before the clock leapt`
      : LEAPT + name;
    const newest = isFirst ? reasons.slice(older.length, leap) : [];
    for (const none of (isBelieved ? newest : reasons).filter(({ length }) => length === 0))
      none.push(why);
  }
  return entries.map((entry, i) => ({ entry, reasons: reasons[i] ?? [] }));
}

/** The names that the clock leapt to in rows of entries, and those `known` that still stand. */
export function leapNames(
  rows: readonly (readonly NamedTime[])[],
  known: readonly string[] = [],
): string[] {
  const stands = known.filter((name) => rows.some((row) => row.some((one) => one.name === name)));
  const found = rows.flatMap((row) => leapsAmong(row).map((i) => (row[i] as NamedTime).name));
  return [...new Set([...stands, ...found])];
}

/** The name that the clock leapt to, where everything is kept for that. */
export const leaptTo = (decisions: readonly Decision<NamedTime>[]) =>
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

/** What is known of snapshots as parents, by UUID. A map lacks what was not asked for. */
export type Facts = Readonly<{
  /** All subvolumes of their filesystem. */
  all: ReadonlyMap<string, Subvolume>;
  /** In which generation a snapshot was changed last. */
  ctransids: ReadonlyMap<string, number>;
  /**
   * The generation of the top directory, null where nobody can tell: a snapshot has its origin's, a
   * received one its parent's, and so on.
   */
  births: ReadonlyMap<string, number | null>;
  /** Why a difference would lose something, null if it would not; by `pairOf`. */
  losses: ReadonlyMap<string, string | null>;
}>;

/** The key of a difference among the facts. */
const pairOf = (parent: Entry, snapshot: Entry) => `${parent.uuid} ${snapshot.uuid}`;

/** A subvolume's UUID, its parent's, that one's parent's, and so on. The last may be gone. */
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
 * Whether `btrfs send` can tell what changed between two subvolumes. It goes by inode numbers,
 * which mean nothing where neither was made from the other. A snapshot taken here has them from
 * SOURCE. A received one has them from its parent: of two such, one must have been received on top
 * of the other. Where one between them is gone, their top directories tell. Undefined until these
 * are known.
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
 * Whether a snapshot was changed after it was taken. A new one is as old as its source then, or
 * older (DESIGN: ctransid and cgen). Deduplication changes one as well, but not its contents. A
 * received one was written after it was made; whoever edits it takes its received UUID.
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
 * Whether a subvolume is an earlier state of another one: the other was made from it, or, later,
 * from its origin. A difference to a later state, or to one from which the way led back, may lose
 * something: see `lossIn`.
 */
export function isEarlierState(
  one: Subvolume,
  of: Subvolume,
  all: ReadonlyMap<string, Subvolume>,
): boolean {
  const line = lineOf(of, all);
  if (line.includes(one.uuid)) return true;
  // Whatever is received on top of something differs from it.
  const origin =
    one.receivedUuid === null && one.parentUuid !== null ? line.indexOf(one.parentUuid) : -1;
  const next = origin < 2 ? of : all.get(line[origin - 1] as string);
  return origin > 0 && one.cgen !== undefined && next?.cgen !== undefined && one.cgen <= next.cgen;
}

/**
 * The snapshot that another one is a copy of, as --import makes them; null where it may have been
 * changed before it was copied.
 */
export function originalOf(
  { uuid, parentUuid, receivedUuid }: Subvolume,
  { all, ctransids }: Pick<Facts, "all" | "ctransids">,
): Subvolume | null {
  const original = parentUuid === null ? undefined : all.get(parentUuid);
  if (original?.readonly !== true || receivedUuid !== null || original.receivedUuid !== null)
    return null;
  const ctransid = ctransids.get(uuid);
  const isSame = ctransid !== undefined && ctransid <= (original.cgen ?? -1);
  return isSame ? original : null;
}

/** Whether it still is one: an edited snapshot is none, whatever it was compared with. */
function isStillEarlier(one: Subvolume, of: Subvolume, facts: Facts): boolean {
  if (changedSince(one, facts, {}) === true) return false;
  if (isEarlierState(one, of, facts.all)) return true;
  const original = originalOf(one, facts);
  return original !== null && isEarlierState(original, of, facts.all);
}

/** A file that a difference changes, with the ranges that it writes. */
export type Rewritten = Readonly<{
  path: string;
  ranges: readonly { readonly from: number; readonly to: number }[];
  size: number;
  /** Its size in the parent; null where it is not there. */
  before: number | null;
}>;

/** The largest block of a file's data, in bytes: mostly 4 KiB, and a page where that is larger. */
const SECTOR = 65536;

/**
 * The file that a difference would get wrong, if there is one. A file that is made shorter keeps
 * its last block as it is, with the data behind its end. If the file is longer in another
 * subvolume, and has the same block, `btrfs send` takes these data for unchanged, and the receiver
 * has zeros there. (Seen with Linux 6.18.)
 */
export const lossIn = (files: readonly Rewritten[]) =>
  files.find(
    ({ ranges, size, before: end }) =>
      end !== null &&
      size > end &&
      end % SECTOR !== 0 &&
      !ranges.some(({ from, to }) => from <= end && end < to),
  )?.path ?? null;

/** Why a parent is unfit for a snapshot; null if it is fit, undefined until that is known. */
export type Unfit = (parent: Snapshot, snapshot: Snapshot) => string | null | undefined;

/**
 * What makes a parent: it must not be unfit; and one that is known to be an earlier state is
 * preferred to any nearer one.
 */
export type Fitness = Readonly<{
  unfit: Unfit;
  isEarlier: (parent: Snapshot, snapshot: Snapshot) => boolean;
}>;
const ANY: Fitness = { unfit: () => null, isEarlier: () => true };

/**
 * What a destination adds to the facts: changed snapshots that are the same as their backups there,
 * and those that are no parents there, with the reason.
 */
export type Verdicts = { cleared: Cleared; readonly refused: Map<string, string> };

/** Judges parents for a destination. One not yet there is sent earlier in this run, as it is. */
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

/**
 * How many parents are tried that are not known to be earlier states: each costs a walk through all
 * that is different.
 */
const TRIES = 2;

type Against = Pick<Transfer, "parent" | "why">;

/**
 * The nearest parent that both sides hold, and why no nearer one is fit: an earlier state; or else
 * the nearest of the `earlier` ones (the last); or else of the `later` ones (the first).
 */
function nearestFit(
  snapshot: Snapshot,
  earlier: readonly Snapshot[],
  later: readonly Snapshot[],
  { unfit, isEarlier }: Fitness,
): Against {
  let why: string | undefined;
  const unsure: Snapshot[] = [];
  const isFit = (parent: Snapshot) => {
    const reason = unfit(parent, snapshot) ?? undefined;
    why ??= reason;
    return reason === undefined;
  };
  const state = earlier.findLast((one) => {
    if (isEarlier(one, snapshot)) return isFit(one);
    unsure.push(one);
    return false;
  });
  const others = () => [...unsure.slice(0, TRIES), ...later.slice(0, 1)].find(isFit);
  return { parent: state ?? others() ?? null, why };
}

/**
 * `failed`: the UUIDs of snapshots that earlier runs could not send; `backfill`: sends also those
 * older than the newest that both have.
 */
export type TransferOptions = Readonly<{
  policy: Policy | null;
  incremental: boolean;
  newestOnly: boolean;
  now: number;
  fullEvery: FullEvery | null;
  backfill?: boolean;
  failed?: ReadonlySet<string>;
  /** What its policy keeps may have been deleted there all the same, for space. */
  freed?: boolean;
}>;

/** A stored chain: so many streams, the first one from `since`. */
type Chain = { readonly length: number; readonly since: number };

/** Whether a chain ends before a snapshot of `time`. */
const chainEnds = ({ length, since }: Chain, time: number, { count: most, unit }: FullEvery) =>
  unit === null ? most > 0 && length >= most : momentBefore(time, most, unit) >= since;

/**
 * Begins new chains in a plan: a stream is a full one where its parent's chain ends, as it stands
 * there, or with the streams planned before.
 */
function renewing({ held, chained }: Standing, fullEvery: FullEvery | null) {
  const find = dataFinder(held);
  const standing = byUuid(held);
  const planned = new Map<Snapshot | null, Chain>();
  const chainAt = (parent: Snapshot | null): Chain => {
    const there = parent === null ? undefined : find(parent);
    const streams = there === undefined ? [] : chainOf(there, standing);
    return { length: streams.length, since: timeIn(streams[0]?.name ?? "") ?? 0 };
  };
  return (snapshot: Snapshot, nearest: Against): Against => {
    if (chained === null || fullEvery === null) return nearest;
    const { time } = snapshot;
    const chain = planned.get(nearest.parent) ?? chainAt(nearest.parent);
    const against = chainEnds(chain, time, fullEvery) ? { parent: null } : nearest;
    const isNew = against.parent === null;
    planned.set(
      snapshot,
      isNew ? { length: 1, since: time } : { ...chain, length: chain.length + 1 },
    );
    return against;
  };
}

/** Tells which snapshots a destination wants, if it lacks them: those its policy would keep. */
function wantedAt(
  snapshots: readonly Snapshot[],
  { backups }: Standing,
  { policy, now, newestOnly }: TransferOptions,
): (snapshot: Snapshot) => boolean {
  const here = dataFinder(snapshots); // the relation is the same from both sides
  const gone = backups.filter((backup) => here(backup) === undefined);
  const rank = new Map(snapshots.map(({ uuid }, i) => [uuid, i]));
  const all = arrange<Snapshot>([...gone, ...snapshots], ({ uuid }) => rank.get(uuid));
  const kept = new Set(keptBy(retain(all, policy, now)).map(({ uuid }) => uuid));
  const newest = snapshots.at(-1);
  // The newest always: a backup that is dated in the future must not stand in its place.
  return (snapshot) => snapshot === newest || (!newestOnly && kept.has(snapshot.uuid));
}

/** What a destination gets, what it cannot get, and how many snapshots it is not to get. */
type TransferPlan = {
  readonly transfers: Transfer[];
  readonly conflicts: Conflict[];
  skipped: number;
};

/**
 * What a destination lacks of all that its policy would keep, oldest first: each snapshot against
 * the nearest one that both sides hold by then (see `nearestFit`), or in full if they share
 * nothing. `snapshots` are in the source's order; those that stand elsewhere (`beyond`) come first,
 * and are only parents. Without a policy, or where space is freed, one that is older than the newest
 * that both have was deleted there, or left out on purpose: it is `skipped`.
 */
export function planTransfers(
  snapshots: readonly Snapshot[],
  standing: Standing,
  options: TransferOptions,
  fitness = ANY,
): TransferPlan {
  const { incremental, backfill, failed } = options;
  const isDeleted = options.policy === null || options.freed === true;
  const find = dataFinder(standing.held);
  const own = snapshots.filter(({ beyond }) => beyond === undefined);
  const isWanted = wantedAt(own, standing, options);
  const renewed = renewing(standing, options.fullEvery);
  const isSkipped = ({ uuid }: Snapshot) => isDeleted && !backfill && failed?.has(uuid) !== true;
  const plan: TransferPlan = { transfers: [], conflicts: [], skipped: 0 };
  const shared: Snapshot[] = [];
  /** What both have that is later than the snapshot at hand, the nearest last. */
  const later = snapshots.filter((snapshot) => find(snapshot) !== undefined).reverse();
  for (const snapshot of snapshots) {
    if (find(snapshot) !== undefined) {
      later.pop();
      shared.push(snapshot);
      continue;
    }
    if (snapshot.beyond !== undefined || !isWanted(snapshot)) continue;
    const isBelated = later.length > 0;
    if (isBelated && isSkipped(snapshot)) {
      plan.skipped++;
      continue;
    }
    const obstacle = standing.obstacles.get(snapshot.name);
    if (obstacle !== undefined && obstacle.kind !== "leftover") {
      plan.conflicts.push({ snapshot, obstacle });
      continue;
    }
    const nearest = incremental
      ? nearestFit(snapshot, shared, later.slice(-1), fitness)
      : { parent: null };
    const belated = isBelated ? { belated: true as const } : {};
    plan.transfers.push({ snapshot, ...renewed(snapshot, nearest), ...belated });
    shared.push(snapshot);
  }
  return plan;
}

// ── import: what is taken over of what others took ──

/**
 * A snapshot that somebody else took, by its path below the directory where they are kept, with the
 * moment that its place tells and what its maker said of it.
 */
export type Foreign = Subvolume & {
  readonly below: string;
  readonly moment: number;
  readonly words: string | null;
};

/** What a run takes over, oldest first, and what it does not. */
type ImportPlan = {
  readonly coming: readonly Foreign[];
  /** All of this source that can be taken over, or were, in the order of their IDs. */
  readonly whole: readonly Foreign[];
  readonly older: readonly Foreign[];
  readonly writable: readonly Foreign[];
  readonly unrelated: readonly Foreign[];
};

/**
 * Decides what is taken over into a chain, which is in the source's order; `all` knows what its
 * snapshots were taken over from. A source's own are the
 * snapshots of it, and those that were made of what it was made from, before it was: a rolled-back
 * system goes on in a snapshot. What is older than the chain's newest snapshot would get a greater
 * ID, and count as the newest.
 */
export function planImport(
  found: readonly Foreign[],
  chain: readonly Snapshot[],
  { uuid: sourceUuid, all }: { readonly uuid: string; readonly all: Facts["all"] },
): ImportPlan {
  const source = all.get(sourceUuid);
  const origins = source === undefined ? [] : lineOf(source, all).slice(1);
  const isOurs = ({ parentUuid, receivedUuid, cgen = Infinity }: Foreign) =>
    parentUuid !== null &&
    receivedUuid === null &&
    (parentUuid === sourceUuid ||
      (origins.includes(parentUuid) && cgen <= (source?.cgen ?? -Infinity)));
  const others = found.filter(({ uuid }) => uuid !== sourceUuid);
  const ours = others.filter(isOurs);
  const whole = ours.filter(({ readonly }) => readonly).sort((a, b) => a.id - b.id);
  const newest = chain.at(-1);
  const taken = new Set(chain.map(({ parentUuid }) => parentUuid));
  const original = newest && importedFrom(newest, [sourceUuid, ...origins], all);
  // A clock can have been wrong, and a name can say a second more than the moment, or only the day.
  const isNewer = (one: Foreign) =>
    newest === undefined ||
    (original === undefined ? one.moment > newest.moment : one.id > original.id);
  const left = whole.filter(({ uuid }) => !taken.has(uuid));
  return {
    coming: left.filter(isNewer),
    whole,
    older: left.filter((one) => !isNewer(one)),
    writable: ours.filter(({ readonly }) => !readonly),
    unrelated: others.filter((one) => !isOurs(one)),
  };
}

/** The snapshot that another one was taken over from, where it is known: neither SOURCE nor received. */
function importedFrom(
  { parentUuid, receivedUuid }: Snapshot,
  sources: readonly string[],
  all: Facts["all"],
): Subvolume | undefined {
  if (parentUuid === null || receivedUuid !== null || sources.includes(parentUuid))
    return undefined;
  const original = all.get(parentUuid);
  return original?.readonly && original.receivedUuid === null ? original : undefined;
}

/**
 * How a subvolume that stands elsewhere (`path`, from the top level) is reached from a folder
 * behind the fence, where nothing is mounted over anything; null where it is not below the root of
 * the folder's mount: `btrfs send` wants both sides of a difference on one mount.
 */
export function beyondFolder(
  folder: Pick<Folder, "fenced" | "mounts" | "place" | "top">,
  path: string,
): string | null {
  const { mount } = placeOn(folder.mounts, folder.place.path);
  return folder.fenced && isWithin(path, mount.root) ? relative(folder.top, path) : null;
}

/**
 * What a command gets, which cannot be asked what it has: all that is newer than the last stream it
 * took, or only the newest snapshot if there was none.
 */
export function planStreams(
  snapshots: readonly Snapshot[],
  memory: Pin | null,
  options: { readonly incremental: boolean; readonly newestOnly: boolean; readonly prefix: string },
  fitness = ANY,
): Transfer[] {
  const last = memory === null ? -1 : snapshots.findIndex(({ uuid }) => uuid === memory.uuid);
  // The remembered snapshot is gone: its name still tells what came after it.
  const time = memory && parseName(memory.name, options.prefix);
  const newer =
    last !== -1
      ? snapshots.slice(last + 1)
      : snapshots.filter((snapshot) => snapshot.time > (time ?? -Infinity));
  const sent = memory === null || options.newestOnly ? newer.slice(-1) : newer;
  return sent.map((snapshot, i) => {
    const parent = sent[i - 1] ?? snapshots[last];
    const earlier = options.incremental && parent !== undefined ? [parent] : [];
    return { snapshot, ...nearestFit(snapshot, earlier, [], fitness) };
  });
}

/** What planning must know of the backups at a destination. */
type Kept = Pick<Standing, "backups" | "copied" | "chained" | "newest">;

/**
 * What retention does at a destination after its transfers. Strangers are not among `backups`.
 * Three stay whatever the policy: the newest backup, the newest that the source still has (the
 * pin), and the last that was copied on; and of streams, all that these build on.
 */
export function planDestination(
  snapshots: readonly Snapshot[],
  { backups, copied, chained, newest }: Kept,
  retention: Retention,
): Decision<Backup>[] {
  const find = dataFinder(backups);
  const shared = snapshots.map(find);
  const rank = new Map(shared.map((backup, i) => [backup?.uuid, i]));
  const pinned = shared.findLast((backup) => backup !== undefined);
  const ordered = arrange(backups, ({ uuid }) => rank.get(uuid));
  const decisions = retained(ordered, retention).map(({ entry, reasons }) => ({
    entry,
    reasons: [
      ...reasons,
      ...(entry.uuid === newest ? ["the newest of the data"] : []),
      ...(entry === pinned ? ["shared with the source"] : []),
      ...(copied.has(entry.uuid) ? [`shared with ${copied.get(entry.uuid)}`] : []),
      ...keptByHand(entry),
    ],
  }));
  const needed = neededBy(keptBy(decisions), { backups, chained });
  return decisions.map((decision) => {
    const by = needed.get(decision.entry.uuid);
    if (decision.reasons.length > 0 || by === undefined) return decision;
    return { ...decision, reasons: [`needed by ${by}`] };
  });
}

/** By UUID, all that backups, and streams of others, build on, and the name of one that does. */
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

/** The order to delete backups in: streams before their parents, so that none ever lacks one. */
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

// ── keep: what no retention lets go, and what goes for space ──

/** The reason to keep what somebody keeps. */
const keptByHand = ({ kept: note }: Entry) =>
  note === undefined ? [] : [`kept by hand${note === "" ? "" : `: ${note}`}`];

/** The units whose words of a policy hold when space is short. */
const LASTING: readonly Unit[] = ["m", "y"];

/** What of a policy holds when space is short: the newest so many, and its words with m and y. */
function lastingPart(policy: Policy | null, newest: number): Policy {
  const long = (words: readonly Duration[] = []) =>
    words.filter(({ unit }) => LASTING.includes(unit));
  const [firstOf, within] = [long(policy?.firstOf), long(policy?.within)];
  return { text: policy?.text ?? "", newest, firstOf, within };
}

/**
 * What may go at a destination beyond its policy, for space, in the order in which it goes: the
 * oldest first, but a stream behind all that build on it, so that none ever lacks one. Never the
 * `newest` so many, what the policy's words with m and y keep, and what stays whatever the policy.
 */
export function planFreeing(
  snapshots: readonly Snapshot[],
  standing: Kept,
  retention: Retention,
  newest: number,
): Backup[] {
  const policy = lastingPart(retention.policy, newest);
  const going = planDestination(snapshots, standing, { ...retention, policy })
    .filter(({ reasons }) => reasons.length === 0)
    .map(({ entry }) => entry);
  if (standing.chained === null) return going;
  const children = groupBy(going, ({ parentUuid }) => parentUuid);
  const order = new Set<Backup>();
  for (const oldest of going) {
    const line = order.has(oldest) ? [] : [oldest];
    for (const one of line) line.push(...(children.get(one.uuid) ?? []));
    for (const one of line.reverse()) order.add(one);
  }
  return [...order];
}

/**
 * How far deletions have come. `found`: what was free before the first one, and after each. One
 * whose subvolume is held would go on in vain, and so would two in turn that free less than a
 * hundredth of what is missing.
 */
export function freeingState(
  found: readonly Free[],
  wanted: number,
): "enough" | "lacking" | "held" | "in vain" {
  const free = found.map(({ bytes }) => bytes);
  if ((free.at(-1) ?? 0) >= wanted) return "enough";
  if (found.slice(1).some(({ held }) => held.length > 0)) return "held";
  const vain = free.slice(1).map((after, i) => {
    const before = free[i] as number;
    return after - before < (wanted - before) / 100;
  });
  return vain.length >= 2 && vain.slice(-2).every(Boolean) ? "in vain" : "lacking";
}

// ── diff: what an interrupted one left, and what can be compared ──

/** The name of the snapshot that a comparison with now makes, and deletes again. */
const COMPARED_NAME = /^\.btrfs-backup\.diff-[0-9a-f]{16}$/;

/** The snapshots in a folder that comparisons made, and that may go unless one still runs. */
export const comparedIn = (
  standing: readonly Pick<Entry, "name" | "readonly" | "receivedUuid">[],
) =>
  standing
    .filter((one) => COMPARED_NAME.test(one.name) && one.readonly && one.receivedUuid === null)
    .map(({ name }) => name);

/**
 * Whether an inode number means the same file in two read-only subvolumes, as btrfs send takes for
 * granted. Two that were made here are of one subvolume, or one of them was made from the other. Of
 * others see `related`. Undefined until the generations of their top directories are known.
 */
export function areComparable(a: Subvolume, b: Subvolume, facts: Facts): boolean | undefined {
  if (a.receivedUuid !== null || b.receivedUuid !== null) return related(a, b, facts);
  const line = lineOf(a, facts.all);
  return lineOf(b, facts.all).some((uuid) => line.includes(uuid));
}

// ── what goes at the source ──

/** A destination as retention at the source sees it. */
export type Claimant = Readonly<{
  id: string;
  pin: { readonly uuid: string } | null;
  /** It was given in this run, and could not be read. */
  unread: boolean;
  /** The policy for which all that it could not get is kept; null if nothing is. */
  unsentPolicy: { readonly policy: Policy | null } | null;
  /** UUIDs of snapshots older than the pin that could not be sent there. */
  failed?: readonly string[] | undefined;
}>;

/**
 * What retention does at the source. Every known destination's pin stays. Everything stays while a
 * destination could not be read that has no pin, or one that is gone (a restored record is old).
 * `full`: hardly any space is left, so the older half of what is only kept to be sent goes.
 */
export function planSource(
  snapshots: readonly Snapshot[],
  claimants: readonly Claimant[],
  retention: Retention & { readonly full?: boolean },
): Decision<Snapshot>[] {
  const extra = new Map<string, string[]>(snapshots.map(({ uuid }) => [uuid, []]));
  for (const { id, pin, unread, unsentPolicy, failed = [] } of claimants) {
    const pinned = snapshots.findIndex(({ uuid }) => uuid === pin?.uuid);
    if (pinned !== -1) extra.get(snapshots[pinned]?.uuid ?? "")?.push(`shared with ${id}`);
    if (unread && pinned === -1)
      for (const reasons of extra.values()) reasons.push(`nothing is known of ${id} yet`);
    if (unsentPolicy === null) continue;
    retain(snapshots, unsentPolicy.policy, retention.now).forEach(
      ({ entry, reasons }, i) =>
        (i > pinned || failed.includes(entry.uuid)) &&
        reasons.length > 0 &&
        extra.get(entry.uuid)?.push(UNSENT + id),
    );
  }
  const decisions = retained(snapshots, retention).map(({ entry, reasons }) => ({
    entry,
    reasons: [...reasons, ...(extra.get(entry.uuid) ?? []), ...keptByHand(entry)],
  }));
  const unsent = decisions.filter(isOnlyUnsent);
  const lost = new Set(retention.full ? unsent.slice(0, Math.ceil(unsent.length / 2)) : []);
  return decisions.map((one) => (lost.has(one) ? { ...one, reasons: [] } : one));
}

const UNSENT = "not yet sent to ";
const isOnlyUnsent = ({ reasons }: Decision<Snapshot>) =>
  reasons.length > 0 && reasons.every((reason) => reason.startsWith(UNSENT));

/** By a destination's ID, how many snapshots are kept only to be sent there, and the oldest. */
export function unsentIn(
  decisions: readonly Decision<Snapshot>[],
): Map<string, { count: number; oldest: string }> {
  const unsent = new Map<string, { count: number; oldest: string }>();
  for (const { entry, reasons } of decisions.filter(isOnlyUnsent))
    for (const reason of reasons) {
      const id = reason.slice(UNSENT.length);
      const { count: many, oldest } = unsent.get(id) ?? { count: 0, oldest: entry.name };
      unsent.set(id, { count: many + 1, oldest });
    }
  return unsent;
}

/**
 * A snapshot in a row of a table: `whole` can be given back, `other` is other data by the name,
 * `foreign` is complete, and was there when its folder became this source's (--adopt).
 */
export type Cell = {
  readonly state: "whole" | "incomplete" | "other" | "foreign";
  readonly entry: Snapshot;
};
export type Row = NamedTime & { readonly moment: number; readonly cells: (Cell | undefined)[] };

/** Lays the same data side by side: a row a snapshot, oldest first, with a cell for each folder. */
export function align(columns: readonly (Folder | null)[]): Row[] {
  const rows: Row[] = [];
  const [byData, byName] = [new Map<string, Row>(), new Map<string, Row>()];
  /** Puts an entry into the row of its data, none if incomplete, or of its name, or a new one. */
  const put = (
    entry: Snapshot,
    data: readonly string[],
    column: number,
    unfit: "incomplete" | "foreign",
  ) => {
    const isFree = (one: Row | undefined) => one !== undefined && one.cells[column] === undefined;
    const { name, time, moment } = entry;
    const same = data.map((uuid) => byData.get(uuid)).find(isFree);
    const alike = same ?? byName.get(name);
    const row: Row =
      alike !== undefined && isFree(alike)
        ? alike
        : { name, time, moment, cells: columns.map(() => undefined) };
    if (row !== alike) rows.push(row);
    if (!byName.has(row.name)) byName.set(row.name, row);
    const isOther = same === undefined && row.cells.some((cell) => cell?.state === "whole");
    const held = isOther ? "other" : "whole";
    row.cells[column] = { state: data.length === 0 ? unfit : held, entry };
    if (!isOther) for (const uuid of data) byData.set(uuid, row);
  };
  for (const [i, column] of columns.entries()) {
    const whole = new Set(column === null ? [] : wholeIn(column));
    const strangers = new Set(column?.chain.strangers);
    for (const entry of column?.snapshots ?? []) {
      const unfit = isComplete(entry) && strangers.has(entry.uuid) ? "foreign" : "incomplete";
      put(entry, whole.has(entry) ? [entry.uuid, dataOf(entry)] : [], i, unfit);
    }
  }
  const rank = new Map(columns[0]?.snapshots.map(({ uuid }, i) => [uuid, i]));
  return arrange(rows, ({ cells }) => rank.get(cells[0]?.entry.uuid ?? ""));
}

/**
 * How a backup gets to where it is restored: from a subvolume that is `present` there, or as a
 * stream on top of one that both sides have.
 */
export type RestorePlan = { readonly present: Subvolume | null } & Against;

/**
 * The streams of a chain that have to be received beside some subvolumes: those after the last that
 * is there. The chosen one always is.
 */
export function planPieces(chain: readonly Stream[], there: readonly Subvolume[]): Stream[] {
  const find = dataFinder([
    ...there,
    ...there
      .filter(({ receivedUuid }) => receivedUuid === null)
      .map((one) => ({ ...one, receivedUuid: one.uuid })),
  ]);
  return chain.slice(chain.slice(0, -1).findLastIndex((piece) => find(piece) !== undefined) + 1);
}

/**
 * `whole`: the backups at the location, oldest first; `there`: the read-only subvolumes that a
 * receive could build on.
 */
export function planRestore(
  chosen: Snapshot,
  whole: readonly Snapshot[],
  there: readonly Subvolume[],
  fitness = ANY,
): RestorePlan {
  const present = there.find(({ receivedUuid }) => receivedUuid === dataOf(chosen)) ?? null;
  const find = dataFinder(there);
  const shared = (some: readonly Snapshot[]) => some.filter((one) => find(one) !== undefined);
  // Up to itself: where its data is there under another UUID, the stream is a few bytes.
  const behind = whole.findIndex(({ uuid }) => uuid === chosen.uuid) + 1 || whole.length;
  const [earlier, later] = [shared(whole.slice(0, behind)), shared(whole.slice(behind))];
  return { present, ...nearestFit(chosen, earlier, later, fitness) };
}

/** What interrupted restores to a name left: directories, with their subvolumes, inner first. */
export function leftoversOf(
  name: string,
  { top, entries, subvolumes }: Pick<Folder, "top" | "entries" | "subvolumes">,
): Map<string, string[]> {
  const begins = `${name}.restoring-`;
  const ours = [...entries].filter(
    (entry) => entry.startsWith(begins) && parseName(entry, begins) !== null,
  );
  const paths = new Set(subvolumes.map(({ path }) => `/${path}`));
  // The work of a restore of a whole tree has the mark of NEST: its subvolumes have any names.
  const isMade = (path: string, above: string) =>
    path === "tree" ||
    path === "members" ||
    (path.startsWith("tree/") && paths.has(`${above}members`)) ||
    ((path.startsWith("tree/") || !path.includes("/")) && prefixOf(basename(path)) !== null);
  const depth = (path: string) => path.split("/").length;
  const below = (above: string) =>
    subvolumes
      .map(({ path }) => `/${path}`)
      .filter((path) => path.startsWith(above))
      .map((path) => path.slice(above.length))
      .filter((path) => isMade(path, above))
      .map((path) => `./${path}`)
      .sort((a, b) => depth(b) - depth(a));
  return new Map(ours.map((entry) => [entry, below(`${join(top, entry)}/`)]));
}

/** One step of a way through stored streams: `gone` is needed no more behind it. */
export type Visit = {
  readonly piece: Stream;
  readonly isWanted: boolean;
  readonly gone: readonly Stream[];
};

/**
 * The way through stored streams on which all that is wanted (by UUID) is received once, with what
 * it builds on. A stream goes when the last that builds on it is there, or it has been seen.
 */
export function planVisits(wanted: ReadonlySet<string>, streams: readonly Stream[]): Visit[] {
  const all = byUuid(streams);
  const parents = new Set(streams.map(({ parentUuid }) => parentUuid));
  // Of two streams with the same data, all others stand on one.
  const single = new Map<string | null, Stream>();
  for (const one of streams)
    if (wanted.has(one.uuid) && (parents.has(one.uuid) || !single.has(one.receivedUuid)))
      single.set(one.receivedUuid, one);
  const seen = new Set(single.values());
  const needed = new Set([...seen].flatMap((one) => chainOf(one, all)));
  const children = groupBy([...needed], ({ parentUuid }) => parentUuid);
  const left = new Map<string, number>();
  const visits: Visit[] = [];
  const next = [...(children.get(null) ?? [])].reverse();
  for (let piece; (piece = next.pop()) !== undefined;) {
    const above = children.get(piece.uuid) ?? [];
    left.set(piece.uuid, above.length);
    const parent = piece.parentUuid === null ? undefined : all.get(piece.parentUuid);
    const others = parent === undefined ? 1 : (left.get(parent.uuid) as number) - 1;
    if (parent !== undefined) left.set(parent.uuid, others);
    const gone = [
      ...(parent !== undefined && others === 0 ? [parent] : []),
      ...(above.length === 0 ? [piece] : []),
    ];
    visits.push({ piece, isWanted: seen.has(piece), gone });
    next.push(...[...above].reverse());
  }
  return visits;
}

/** Whether so many bytes of streams may be received where nobody said so: see --scratch. */
export const fitsBeside = (bytes: number, free: number): boolean => bytes * 1.5 <= free / 2;

/** Whether what is received for a while leaves too little of a filesystem. */
export const isNearlyFull = (free: number, size: number): boolean => free < size / 10;

/**
 * A subvolume that holds the same data as a backup: what the backup was made of, or else another
 * copy of it.
 */
export function sameDataAmong<T extends Subvolume>(
  backup: Subvolume,
  subvolumes: readonly T[],
): T | undefined {
  const all = subvolumes.filter(
    ({ uuid, readonly, path }) => readonly && uuid !== backup.uuid && !IN_WORK.test(path),
  );
  const data = dataOf(backup);
  return all.find(({ uuid }) => uuid === data) ?? all.find((one) => one.receivedUuid === data);
}

/**
 * The destinations in a restored snapshot folder's record, by those in the record when the restored
 * snapshot was taken. Only a snapshot that `stands` is a pin; the place that the restored one came
 * from shares it.
 */
export function restoredDestinations(
  recorded: readonly KnownDestination[],
  stands: (uuid: string) => boolean,
  came: { readonly id: string; readonly filesystem: string | null; readonly pin: Pin } | null,
): KnownDestination[] {
  // Known by another path: the one folder on that disk, by the same name.
  const [alike, ...more] = recorded.filter(
    ({ filesystem }) => filesystem !== null && filesystem === came?.filesystem,
  );
  const isWhereFrom = (known: KnownDestination, { id }: { readonly id: string }) =>
    known.location === id ||
    (known === alike && more.length === 0 && basename(known.location) === basename(id));
  const pinOf = (known: KnownDestination) => {
    if (came !== null && isWhereFrom(known, came)) return came.pin;
    return known.pin !== null && stands(known.pin.uuid) ? known.pin : null;
  };
  const all = recorded.map((known) => ({ ...known, pin: pinOf(known) }));
  if (came === null || recorded.some((known) => isWhereFrom(known, came))) return all;
  const { id: location, filesystem, pin } = came;
  return [...all, { location, filesystem, pin, last: null }];
}

/**
 * The path from the top level that a restore to a mounted subvolume is about: its own, or that of
 * the one that has replaced it, as long as that one is mounted nowhere, or begins to.
 */
export function replacedBy(
  { root, device }: Pick<Mount, "root" | "device">,
  mounts: readonly Pick<Mount, "root" | "device">[],
  subvolumes: readonly Pick<Subvolume, "path">[],
): string {
  const [, now = "", time] = /^(.*[^/])\.before-(\d{8}-\d{6})$/s.exec(root) ?? [];
  const stands = subvolumes.some(({ path }) => `/${path}` === now);
  const comes = subvolumes.some(({ path }) => `/${path}` === `${now}.restoring-${time}/tree`);
  const isMounted = mounts.some((one) => one.device === device && one.root === now);
  return now !== "" && (stands || comes) && !isMounted ? now : root;
}

/** Whether a restore that has begun to change names beside a subvolume, by its mark, is not finished. */
export const isUnfinished = (root: string, subvolumes: readonly Pick<Subvolume, "path">[]) =>
  subvolumes.some(({ path }) => {
    const [, name] = /^(.+)\.restoring-\d{8}-\d{6}\/members$/s.exec(`/${path}`) ?? [];
    return name === root;
  });

/** How the subvolume `root` gets mounted in the place of the one that was mounted before. */
export type Remount = {
  readonly command: string;
  /** What would bring the old one back, and what to do about it. */
  readonly wrong: readonly string[];
  /** Where else the old one, or something in it, is mounted. */
  readonly others: readonly string[];
};

/** The options of a mount point in the text of an fstab(5); null where there is no line for it. */
function optionsInFstab(fstab: string, path: string): readonly string[] | null {
  const lines = fstab.split("\n").map((line) => line.trim().split(/[ \t]+/));
  const found = lines.find(
    ([device = "#", point]) => !device.startsWith("#") && unescapedPath(point) === path,
  );
  return found === undefined ? null : (found[3] ?? "").split(",");
}

/** `kernel`: the kernel's command line. */
export function planRemount(
  mount: Mount,
  root: string,
  told: { readonly kernel: string; readonly fstab: string; readonly mounts: readonly Mount[] },
): Remount {
  const { path, device } = mount;
  const options = optionsInFstab(told.fstab, path);
  const byId = (some: readonly string[] | null) =>
    some?.find((option) => /^subvolid=(?!(0x)?0*[05]?$)/.test(option));
  const flags = /(?:^|\s)rootflags=(\S+)/.exec(told.kernel)?.[1]?.split(",") ?? null;
  const wrong = [
    { id: byId(options), where: "/etc/fstab has" },
    {
      id: path === "/" ? byId(flags) : undefined,
      where: "the boot loader gives the kernel rootflags with",
    },
  ].flatMap(({ id, where }) =>
    id === undefined
      ? []
      : [
          `${where} ${id} for ${path}, which is the old one: write subvol=${root.slice(1)} in its place`,
        ],
  );
  // Nobody has data below /proc and /sys, where fences stand.
  const isOfIt = (one: Mount) =>
    one.device === device &&
    isWithin(one.root, mount.root) &&
    !["/proc", "/sys"].some((above) => isWithin(one.path, above));
  const others = told.mounts
    .filter((one) => one !== mount && one.path !== path && isOfIt(one))
    .map((one) => one.path);
  const isBelow = told.mounts.some((one) => one.path !== path && isWithin(one.path, path));
  const place = quote(path);
  const anew =
    options === null
      ? `mount -o ${quote(`subvol=${root.slice(1)}`)} ${quote(device)} ${place}`
      : `mount ${place}`;
  const command = path === "/" ? "reboot" : `umount ${isBelow ? "-R " : ""}${place} && ${anew}`;
  return { command, wrong, others };
}

/** What to do where TARGET is a mount point, whose name cannot be given to something else. */
export function mountAdvice(
  words: readonly string[],
  path: string,
  { root, device }: Mount,
): string {
  const target = words.map(quote).join(" ");
  const remount = path === "/" ? "reboot" : `umount ${quote(path)} && mount ${quote(path)}`;
  const top = `mount -o subvolid=5 ${quote(device)} /mnt`;
  if (root === "/")
    return `${path} is a mount point, of the top level of ${device}, which cannot be replaced. Restore beside it, and mount that instead:
  ${top}
  btrfs-backup restore ${target} /mnt/restored
  btrfs subvolume set-default /mnt/restored   # or subvol=restored in /etc/fstab
  ${remount}`;
  return `${path} is a mount point, of the subvolume ${root.slice(1)} of ${device}. Replace that where the top level is mounted:
  ${top}
  btrfs-backup restore --replace ${target} ${quote(`/mnt${root}`)}
  ${remount}
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
  retention: Retention,
): Backup[] {
  const find = dataFinder(backups);
  const planned = (some: readonly Backup[]) =>
    planDestination(snapshots, { backups: some, copied, chained }, retention);
  const then = planned([...backups, ...coming.slice(0, 1).map(backupOf)]);
  const pin = newestShared(snapshots, backups);
  const stays = new Set(
    [
      ...keptBy(then),
      ...coming.map(({ parent }) => parent && find(parent)),
      planned(backups).at(-1)?.entry,
      pin && find(pin),
    ].filter((one) => one !== null && one !== undefined),
  );
  const needed = neededBy([...stays], { backups, chained });
  return backups.filter((one) => !stays.has(one) && !needed.has(one.uuid));
}

/** A pattern of gitignore(5). */
export type IgnoreRule = { readonly shape: RegExp; readonly isNegated: boolean };

/** Reads a pattern as gitignore(5) does; null for a blank line or a comment. */
export function ignoreRule(line: string): IgnoreRule | null {
  const pattern = line.replace(/(?<!\\)[ \t]+$/, "");
  if (pattern === "" || pattern.startsWith("#")) return null;
  const isNegated = pattern.startsWith("!");
  const named = pattern.slice(isNegated ? 1 : 0).replace(/\/$/, "");
  const inner = named.replace(/^\//, "");
  const anywhere = named.includes("/") ? "" : "(?:.*/)?";
  let shape = "";
  const words =
    /^\*\*\/|\/\*\*\/|\/\*\*$|\*+|\?|\[(?:!|\^)?\]?(?:\[:\w+:\]|\\.|[^\]\\])*\]|\\(.)|[^]/gu;
  for (const [word, escaped] of inner.matchAll(words)) {
    if (word === "**/") shape += "(?:.*/)?";
    else if (word === "/**/") shape += "/(?:.*/)?";
    else if (word === "/**") shape += "/.+";
    else if (word.startsWith("*")) shape += "[^/]*";
    else if (word === "?") shape += "[^/]";
    else if (word.startsWith("[") && word.length > 1) shape += bracketShape(word);
    else shape += (escaped ?? word).replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
  }
  try {
    return { shape: new RegExp(`^${anywhere}${shape}$`, "su"), isNegated };
  } catch {
    throw new UsageError(`--exclude: "${line}" is no pattern of gitignore(5)`);
  }
}

/** A bracket expression of glob(7) as one of a RegExp; it never stands for a slash. */
function bracketShape(word: string): string {
  const classes: Readonly<Record<string, string>> = {
    alpha: "a-zA-Z",
    digit: "0-9",
    alnum: "a-zA-Z0-9",
    upper: "A-Z",
    lower: "a-z",
    space: "\\s",
    punct: "!-\\/:-@\\[-`{-~",
    xdigit: "0-9a-fA-F",
  };
  const [, not = "", inner = ""] = /^\[([!^]?)(.*)\]$/su.exec(word) ?? [];
  const members = inner.replace(
    /\[:(\w+):\]|\\(.)|[[\]\\^]/gsu,
    (one, name: string | undefined, escaped: string | undefined) =>
      name === undefined
        ? `\\${escaped ?? one}`.replace(/^\\(?=[\w ])/, "")
        : (classes[name] ?? ""),
  );
  return `(?!/)[${not === "" ? "" : "^"}${members}]`;
}

/** Whether patterns exclude a path, or a directory that it is in. The last that fits decides. */
export function isExcluded(path: string, rules: readonly IgnoreRule[]): boolean {
  const names = path.split("/");
  return names.some((_, i) => {
    const above = names.slice(0, i + 1).join("/");
    return rules.findLast(({ shape }) => shape.test(above))?.isNegated === false;
  });
}

/** The paths that a restore or a snapshot makes beside what is restored. */
const IN_WORK = /(^|\/)[^/]*\.restoring-\d{8}-\d{6}(\/|$)/;

/**
 * The subvolumes below SOURCE that are backed up with it, by their paths there: the writable ones
 * that are neither excluded, nor in a snapshot folder, nor hidden by another mount.
 */
export function membersIn(
  {
    source,
    top: folder,
    subvolumes,
    mounts,
  }: Pick<Inspection, "source" | "top" | "subvolumes" | "mounts">,
  { snapshotFolder, excluded }: { snapshotFolder: string; excluded: readonly IgnoreRule[] },
): Map<string, Subvolume> {
  if (source === null) return new Map();
  const above = source.top === "/" ? "/" : `${source.top}/`;
  const { device } = placeOn(mounts, source.path).mount;
  const isSeen = (path: string, there: string) => {
    const { mount, top } = placeOn(mounts, join(source.path, path));
    return mount.device === device && top === there;
  };
  const found = new Map<string, Subvolume>();
  const all = subvolumes.toSorted((a, b) => (a.path < b.path ? -1 : 1));
  for (const one of all) {
    const there = `/${one.path}`;
    const path = there.slice(above.length);
    const isCandidate = there.startsWith(above) && !one.readonly && !isWithin(there, folder);
    if (!isCandidate || IN_WORK.test(path) || isExcluded(path, excluded)) continue;
    if (isSeen(path, there)) found.set(path, one);
  }
  if (snapshotFolder.startsWith("/")) return found;
  const inFolder = (path: string) =>
    [...found.keys()].some((other) => isWithin(path, join(other, snapshotFolder)));
  return new Map([...found].filter(([path]) => !inFolder(path)));
}

/** The first run without a path, as a record says; a name like "constructor" is a path as well. */
const goneSince = (gone: Readonly<Record<string, string>>, path: string): string | undefined =>
  Object.hasOwn(gone, path) ? gone[path] : undefined;

/**
 * The members that are not there any more, with the first run without them: as the record says, and
 * empty for those that went since the last run.
 */
export function goneFrom(
  folder: Pick<Folder, "top" | "subvolumes" | "chain">,
  members: ReadonlyMap<string, unknown>,
  prefix: string,
): Map<string, string> {
  const known = folder.chain.tree?.gone ?? {};
  const paths = [...membersBelow(folder, prefix), ...Object.keys(known)];
  const gone = [...new Set(paths)].filter((path) => !members.has(path)).sort();
  return new Map(gone.map((path) => [path, goneSince(known, path) ?? ""]));
}

/** The members that had a snapshot folder of their own, with snapshots of the prefix. */
export function membersWithFolders(
  members: ReadonlyMap<string, Pick<Subvolume, "path">>,
  subvolumes: readonly Pick<Subvolume, "path">[],
  { snapshotFolder, prefix }: { snapshotFolder: string; prefix: string },
): Set<string> {
  if (snapshotFolder.startsWith("/")) return new Set();
  const folders = new Set(
    subvolumes
      .filter(({ path }) => parseName(basename(path), prefix) !== null)
      .map(({ path }) => dirname(path)),
  );
  return new Set(
    [...members]
      .filter(([, { path }]) => folders.has(join(path, snapshotFolder)))
      .map(([path]) => path),
  );
}

/**
 * Reads what SNAPSHOTS printed of `paths`. Errors: Failure for any other shape.
 */
export function parseSnapshots(
  told: string,
  paths: readonly string[],
  { top, name }: { readonly top: string; readonly name: string },
): { made: Map<string, Subvolume | Failure>; span: number } {
  const lines = told.replace(/\n$/, "").split("\n");
  const listed = parseSubvolumes(lines.slice(paths.length + 1).join("\n"), "");
  const standing = new Map(listed.map((one) => [`/${one.path}`, one]));
  const made = new Map(
    paths.map((path, i) => {
      const said = lines[i] ?? "";
      const found = standing.get(join(top, path, name));
      const why = said === "ok" ? "it is not where it was taken" : said;
      const one = said === "ok" && found !== undefined ? found : new Failure(`no snapshot: ${why}`);
      return [path.replace(/^\.\/?/, ""), one] as const;
    }),
  );
  return { made, span: 10 * Number(lines[paths.length]) };
}

/**
 * The folders below a place that directly hold subvolumes with a name of the prefix (of any if that
 * is null): the members of a tree, by their paths below it. They are plain directories: what is
 * inside of a subvolume, as a snapshot or a restored copy, or where a restore is at work, is none.
 */
export function membersBelow(
  { top, subvolumes }: Pick<Folder, "top" | "subvolumes">,
  prefix: string | null,
): string[] {
  const above = top === "/" ? "/" : `${top}/`;
  const below = subvolumes
    .map(({ path }) => `/${path}`)
    .filter((path) => path.startsWith(above))
    .map((path) => path.slice(above.length));
  const all = new Set(below);
  const isNamed = (name: string) =>
    prefix === null ? prefixOf(name) !== null : parseName(name, prefix) !== null;
  const isPlain = (folder: string) =>
    isMemberPath(folder) &&
    folder
      .split("/")
      .every(
        (name, i, names) =>
          !all.has(names.slice(0, i + 1).join("/")) && !/\.restoring-\d{8}-\d{6}$/.test(name),
      );
  const folders = below
    .filter((path) => path.includes("/") && isNamed(basename(path)))
    .map(dirname);
  return [...new Set(folders)].filter(isPlain).sort();
}

/**
 * The subvolumes below a SOURCE that have snapshots in a folder of their own, as SOURCE itself has:
 * by their paths, these folders' paths below SOURCE.
 */
export function ownFoldersIn(
  { source, top, subvolumes }: Pick<Folder, "source" | "top" | "subvolumes">,
  prefix: string,
): Map<string, string> {
  const above = source === null || source.top === "/" ? "/" : `${source.top}/`;
  if (source === null || top === source.top || !top.startsWith(above)) return new Map();
  const inner = top.slice(above.length);
  const all = new Set(subvolumes.map(({ path }) => `/${path}`));
  const found = [...all].flatMap((path) => {
    const folder = dirname(path);
    const owner = folder.slice(0, -inner.length - 1);
    const isOwn =
      parseName(basename(path), prefix) !== null &&
      folder.endsWith(`/${inner}`) &&
      owner.startsWith(above) &&
      all.has(owner) &&
      !isWithin(owner, top) &&
      owner.split("/").every((name) => prefixOf(name) === null);
    return isOwn ? [[owner.slice(above.length), folder.slice(above.length)] as const] : [];
  });
  return new Map(found);
}

/**
 * The folders below the root of a tree that belong to it, and the others: their sources must be the
 * subvolumes of that path below the root's source. Where the root has no record of its own, its
 * source is where most of the others say.
 */
export function membersOf<T extends { readonly chain: ChainRecord }>(
  owner: SourceIdentity | undefined,
  found: ReadonlyMap<string, T>,
): { members: Map<string, T>; foreign: string[] } {
  const rootFor = (path: string, { chain }: T) => {
    const end = `/${path}`;
    return chain.owner?.path.endsWith(end)
      ? `${chain.owner.host}:${chain.owner.path.slice(0, -end.length) || "/"}`
      : null;
  };
  const told = [...found].map(([path, one]) => rootFor(path, one));
  const votes = [...groupBy(told, (one) => one)].filter(([root]) => root !== null);
  const most = votes.reduce((first, one) => (one[1].length > first[1].length ? one : first), [
    null,
    [],
  ] as (typeof votes)[0])[0];
  const root = owner === undefined ? most : `${owner.host}:${owner.path}`;
  const isMember = ([path, one]: [string, T]) => rootFor(path, one) === root && root !== null;
  return {
    members: new Map([...found].filter(isMember)),
    foreign: [...found].filter((one) => !isMember(one)).map(([path]) => path),
  };
}

/** What each member of a tree gives to a restore of it as of one run. */
export type TreePlan = {
  /** By path, the root's being empty. */
  readonly chosen: ReadonlyMap<string, Snapshot>;
  /** Those that lack the run's name, and give an earlier one. */
  readonly earlier: readonly string[];
  /** Those that had gone by then. */
  readonly gone: readonly string[];
};

/** `whole`: by path, what can be restored of each, oldest first. */
export function planTree(
  { name, time }: NamedTime,
  whole: ReadonlyMap<string, readonly Snapshot[]>,
  gone: Readonly<Record<string, string>>,
): TreePlan {
  const chosen = new Map<string, Snapshot>();
  const [earlier, left]: [string[], string[]] = [[], []];
  for (const [path, all] of [...whole].sort(([one], [other]) => (one < other ? -1 : 1))) {
    const exact = all.findLast((one) => one.name === name);
    const found = exact ?? all.findLast((one) => one.time <= time);
    if (found === undefined) continue;
    const went = timeIn(goneSince(gone, path) ?? "");
    // A backup from after that belies the mark, which a guarded key can write as it likes.
    const isLeft = went !== null && went <= time && all.every((one) => one.time < went);
    if (exact === undefined && isLeft) left.push(path);
    else chosen.set(path, found);
    if (exact === undefined && chosen.has(path)) earlier.push(path);
  }
  return { chosen, earlier, gone: left };
}

/**
 * Whose snapshots have a file: the SOURCE among the directories around it, and the path of the
 * subvolume below that which the file lies, or lay, in. `tops`: from the top level, the file, and
 * the snapshot folder where that is given as an absolute path. Null where the nearest subvolume is
 * a SOURCE of its own, or no tree has it.
 */
export function memberHaving(
  tops: { readonly file: string; readonly folder: string | null },
  snapshotFolder: string,
  subvolumes: readonly Pick<Subvolume, "path">[],
): { readonly source: string; readonly folder: string; readonly member: string } | null {
  const folders = new Set(
    subvolumes.flatMap(({ path }) =>
      prefixOf(basename(path)) === null ? [] : [dirname(`/${path}`)],
    ),
  );
  const isSubvolume = new Set(subvolumes.map(({ path }) => `/${path}`));
  const around: string[] = [];
  for (let path = dirname(tops.file); ; path = dirname(path)) {
    around.push(path);
    if (path === "/") break;
  }
  for (const source of around) {
    if (tops.folder === null && source !== "/" && !isSubvolume.has(source)) continue;
    const folder = tops.folder ?? join(source, snapshotFolder);
    const inner = around.filter((path) => isWithin(path, source) && path !== source);
    const found = inner.find((path) => folders.has(join(folder, path.slice(source.length))));
    if (found !== undefined) {
      const member = found.slice(source === "/" ? 1 : source.length + 1);
      return { source, folder: join(folder, member), member };
    }
    if (folders.has(folder)) return null;
  }
  return null;
}

/** Whether a source may use a folder for a chain; `strangers`: the backups there of others. */
export type Claim = { readonly accepted: true; readonly strangers: readonly string[] } | Refusal;

/**
 * Why it may not: the chain is its `owner`'s, or nobody knows whose. Or the owner has the source's
 * UUID, and a `newest` backup that the source does not know: one of both is a clone.
 */
type Refusal = { readonly accepted: false; readonly identity: SourceIdentity } & (
  | { readonly owner: SourceIdentity | undefined }
  | { readonly owner: SourceIdentity; readonly newest: Snapshot }
);

/** Both sides of a claim that is refused. */
export function refusalMessage(refusal: Refusal): string {
  const { identity, owner } = refusal;
  const ours = `${identity.host}:${identity.path}`;
  if ("newest" in refusal)
    return `the backups there were made on ${refusal.owner.host}:${refusal.owner.path}, and the newest, ${refusal.newest.name}, is unknown to ${ours}, which has the same subvolume UUID (${identity.uuid}): is one a clone of the other? Use a prefix (-p) or another folder; --adopt goes on with them`;
  const theirs =
    owner === undefined
      ? "an unknown source: nothing there has been received from this one"
      : `${owner.host}:${owner.path} (subvolume ${owner.uuid})`;
  return `the backups there belong to ${theirs}; this source is ${ours} (subvolume ${identity.uuid}). Use a prefix (-p) or another folder; --adopt takes it over`;
}

/** A source that claims a folder's chain. */
type Claiming = Readonly<{
  identity: SourceIdentity;
  chain: ChainRecord;
  /** The backups of the chain. */
  standing: readonly Snapshot[];
  /** Those that hold the source's data. */
  shared: readonly Snapshot[];
  adopt: boolean;
  /** In a tree, a place below SOURCE is the owner, whatever subvolume is there by now. */
  isMember: boolean;
}>;

const areOfOnePlace = (owner: SourceIdentity | undefined, { host, path }: SourceIdentity) =>
  owner?.host === host && owner.path === path;

/**
 * One chain, one owner. Of the backups that hold none of the source's data, the ancestors of those
 * that do are its own as well: each was received on top of its parent.
 */
export function judgeClaim(claiming: Claiming): Claim {
  const { identity, chain, standing, shared, adopt, isMember } = claiming;
  const { owner, strangers = [] } = chain;
  const isSamePlace = areOfOnePlace(owner, identity);
  if (owner?.uuid === identity.uuid) {
    const newest = isSamePlace ? undefined : unknownNewest(claiming);
    if (newest === undefined) return { accepted: true, strangers };
    if (!adopt) return { accepted: false, identity, owner, newest };
  }
  if (standing.length === 0 || (isSamePlace && goesOn(claiming)))
    return { accepted: true, strangers };
  const isGiven = adopt || (isMember && isSamePlace);
  if (!isGiven && (owner !== undefined || shared.length === 0))
    return { accepted: false, identity, owner };
  const needed = neededBy(shared, { backups: standing, chained: [] });
  const own = new Set([...shared.map(({ uuid }) => uuid), ...needed.keys()]);
  const all = new Set([...strangers, ...standing.map(({ uuid }) => uuid)]);
  return { accepted: true, strangers: [...all].filter((uuid) => !own.has(uuid)) };
}

/**
 * Whether a source has some of a chain's own data. Where a subvolume comes back to its path in a tree,
 * what it shares are strangers by then, and what was made there meanwhile is not its own.
 */
function goesOn({ chain, shared, isMember }: Claiming): boolean {
  const foreign = new Set(isMember ? chain.strangers : []);
  return shared.some(({ uuid }) => !foreign.has(uuid));
}

/**
 * The chain's newest backup, unless the source knows it: a clone of a machine has the original's
 * subvolume UUIDs, but not what that has sent since.
 */
function unknownNewest({ chain, standing, shared }: Claiming): Snapshot | undefined {
  const foreign = new Set(chain.strangers);
  const newest = standing.findLast(({ uuid }) => !foreign.has(uuid));
  return shared.some(({ uuid }) => uuid === newest?.uuid) ? undefined : newest;
}

/**
 * The lineages whose streams in a store are a source's own: its first, and those of streams that it
 * sent, or shares data with (it was restored, or rolled back).
 */
export function lineagesOf(
  streams: readonly Stream[],
  owner: StreamOwner,
  snapshots: readonly Snapshot[],
): Set<string> {
  const shared = dataFinder(snapshots);
  const own = streams.filter((one) => one.owner.uuid === owner.uuid || shared(one) !== undefined);
  return new Set([owner.lineage, ...own.map((one) => one.owner.lineage)]);
}

/** A chain's record once `owner` has it. */
function ownedBy(
  owner: SourceIdentity,
  { strangers: _, ...chain }: ChainRecord,
  strangers: readonly string[],
): ChainRecord {
  return { ...chain, owner, ...(strangers.length > 0 ? { strangers } : {}) };
}

// ── 7. Transfer ──────────────────────────────────────────────────────────────────────────

/** How many bytes a stream will have, once that is known; `wanted`: it will be asked. */
type Sized = { readonly size: () => number | undefined; readonly wanted?: () => void };

/** The stage that slows a stream down, and counts bytes for a line, as asked. */
function meter(
  name: string,
  { progress, news }: Pick<Display, "progress" | "news">,
  rate: number | null,
  { size, wanted = () => {} }: Sized,
): Stage[] {
  const slowed = rate === null ? {} : { rate };
  const [key, began, called] = [{}, Date.now(), `${lineOwner()}${name}`];
  const passed = (bytes: number) => {
    const seconds = (Date.now() - began) / 1000;
    return { name: called, bytes, size: size(), seconds };
  };
  if (progress) {
    wanted();
    const line = (bytes: number) =>
      progressLine({ ...passed(bytes), columns: process.stderr.columns || 80 });
    return [relayStage(slowed, (bytes) => terminal.show(key, bytes === null ? null : line(bytes)))];
  }
  if (news === null) return rate === null ? [] : [relayStage(slowed)];
  let told = 0;
  const tell = (bytes: number | null) => {
    const waited = Date.now() - began - told;
    if (bytes === null || waited < news / 2) return;
    wanted();
    if (waited < news) return;
    told += waited;
    log.info(progressNews({ ...passed(bytes), name }));
  };
  return [relayStage(slowed, tell)];
}

/** What a destination got of one snapshot. */
type Sent = { readonly bytes: number | null; readonly seconds: number };

/** Where a stream goes: a destination, or what stands for one. */
type Receiver = Pick<Destination, "id" | "form" | "receive" | "discard" | "tidy">;

/** What is sent, and shown of it. */
type Send = { readonly source: Folder; readonly transfer: Transfer; readonly display: Display };

/** Sends a snapshot to a destination, which is as before if it fails. Errors: as `pipeline`. */
const transferTo = async (receiver: Receiver, send: Send): Promise<Sent> =>
  resultOf((await transferToAll([receiver], send))[0]);

/**
 * Sends one snapshot to destinations that take the same stream, which is made once. Tells each
 * one's outcome: where it fails, all is as before.
 */
async function transferToAll(
  receivers: readonly Receiver[],
  send: Send,
): Promise<PromiseSettledResult<Sent>[]> {
  const { source, transfer } = send;
  const began = Date.now();
  const ready = await Promise.allSettled(receivers.map((one) => one.receive(source, transfer)));
  const incoming = receivers.flatMap((receiver, i): [Receiver, Incoming][] =>
    ready[i]?.status === "fulfilled" ? [[receiver, ready[i].value]] : [],
  );
  const flowing = incoming.length === 0 ? [] : await flowTo(incoming, send);
  const flown = new Map(incoming.map(([receiver], i) => [receiver, flowing[i]]));
  return Promise.allSettled(
    receivers.map(async (receiver, i): Promise<Sent> => {
      const { finish } = resultOf(ready[i]);
      try {
        const { bytes, summed } = resultOf(flown.get(receiver));
        const stored = finish === undefined ? bytes : await finish(summed as Summed);
        return { bytes: stored, seconds: (Date.now() - began) / 1000 };
      } catch (error) {
        return sendAgain(receiver, error as Error, send);
      }
    }),
  );
}

/** Clears a broken transfer away, and repeats it if it can end otherwise. Errors: what broke it. */
async function sendAgain(receiver: Receiver, error: Error, send: Send): Promise<Sent> {
  const { name } = send.transfer.snapshot;
  if (error instanceof OtherStream) {
    log.info(`${name}: its stream has changed since the transfer broke, which begins anew`);
    await receiver.tidy();
    return transferTo(receiver, send);
  }
  if (error instanceof Stuck) throw error;
  // What stood in the way of the name is not what this transfer left.
  if (!/File exists/.test(error.message))
    await whileCleaning(() => receiver.discard(name)).catch((problem: Error) =>
      log.warn(`${problem.message} (the next run will)`),
    );
  checkInterruption();
  const form = receiver.form(send.source);
  if (!form?.chosen || !/encoded.write|--protocol 1/i.test(error.message)) throw error;
  log.info(`${name}: ${error.message}; once more with protocol 1`);
  const older = { ...form, protocol: "1", chosen: false };
  return transferTo({ ...receiver, form: () => older }, send);
}

/** Makes the stream, and lets it flow to all who take it. */
async function flowTo(
  incoming: readonly (readonly [Receiver, Incoming])[],
  send: Send,
): Promise<PromiseSettledResult<Piped>[]> {
  const [[first, { kept, stages, environment }]] = incoming as [readonly [Receiver, Incoming]];
  const { source, transfer, display } = send;
  const { snapshot, parent } = transfer;
  const form = kept ?? (first.form(source) as Form);
  const { level, rate } = form;
  const others = incoming.length === 1 ? "" : ` and ${incoming.length - 1} more`;
  const beside = besideTransfer(source, transfer);
  const sized = sizedBy(
    beside,
    kept,
    level === "",
    parent === null ? display.sizes.get(snapshot.uuid) : undefined,
  );
  // How many bytes a compressed stream has is known only behind the host that compresses it.
  const isCounted = level === "" || incoming.every(([, { finish }]) => finish);
  const trunk = [
    sender(send, form),
    ...(isCounted ? [] : [relayStage({})]),
    ...meter(`${snapshot.name} to ${first.id}${others}`, display, rate, sized),
  ];
  try {
    if (incoming.length === 1)
      return await Promise.allSettled([pipeline([...trunk, ...stages], environment)]);
    const takers = incoming.map(([, one]) => one);
    return await fanOut(trunk, takers);
  } finally {
    await whileCleaning(beside.end);
  }
}

/** How much of a stream is to come: as quotas say, or by an estimate beside it. */
function sizedBy(
  { size, begin }: Beside,
  kept: Begun | undefined,
  isPlain: boolean,
  quota: number | undefined,
): Sized {
  // What is compressed on the way is counted as it is then.
  if (!isPlain) return { size: () => undefined };
  const here = kept?.bytes ?? 0;
  return {
    size() {
      const all = size() ?? quota;
      return all === undefined ? undefined : Math.max(0, all - here);
    },
    wanted: quota === undefined ? begin : () => {},
  };
}

/** The sending end of a transfer, from behind the part that is kept over there. */
function sender(
  { source, transfer: { snapshot, parent }, display }: Send,
  { level, protocol, bytes = 0, sum = "" }: Form & Partial<Begun>,
): Stage {
  const hexadecimal = (one: Snapshot | null) =>
    one === null || source.alone ? "" : dataOf(one).replaceAll("-", "");
  const given = {
    flag: display.btrfsDebug ? "-vv" : "-q",
    ...at(source),
    level,
    protocol: protocol ?? "",
    holder: holderOf(source),
    snapshot: snapshot.name,
    parent: parent ? fromFolder(parent) : "",
    skip: bytes === 0 ? "" : String(bytes),
    sum: bytes === 0 ? "" : sum,
    uuid: hexadecimal(snapshot),
    clone: hexadecimal(parent),
  };
  const what = `btrfs send${level === "" ? "" : " or zstd"}`;
  return verbStage(what, source.host, SEND, given, { sends: true, shown: display.btrfsDebug });
}

/**
 * Runs the stages of one stream, and the stages of each who takes it as a pipeline of its own, so
 * that one that fails, or is stuck, drops out. Where the stream itself fails, all are killed before
 * their input closes.
 */
async function fanOut(
  stages: readonly Stage[],
  takers: readonly Incoming[],
): Promise<PromiseSettledResult<Piped>[]> {
  const directory = mkdtempSync(join(runtimeDirectory(), "f"));
  const pipes = takers.map((_, i) => `${directory}/${i}`);
  const made = spawnSync("mkfifo", pipes);
  if (made.error !== undefined) throw made.error;
  const branches: RunningPipeline[] = [];
  let trunk: RunningPipeline | null = null;
  let isFlowing = true;
  const blocked = (): readonly number[] => (isFlowing ? (trunk?.blocked() ?? []) : []);
  try {
    for (const [i, taker] of takers.entries()) {
      // Who waits because another one keeps the stream from all does nothing, and is not stuck.
      const waits = () => isFlowing && !blocked().includes(i);
      const joint = { input: pipes[i] as string, waits };
      branches.push(startPipeline(taker.stages, taker.environment ?? {}, joint));
    }
    const feeds = branches.map(({ group }) => group);
    const to = feeds.map((group, i) => ({ path: pipes[i] as string, group }));
    trunk = startPipeline(
      [...stages, relayStage({ to })],
      {},
      { feeds, waits: () => blocked().length > 0 },
    );
  } catch (error) {
    for (const { kill, ended } of branches) {
      kill();
      await ended.catch(() => {});
    }
    rmSync(directory, { recursive: true, force: true });
    throw error;
  }
  // As long as we hold them open, nobody takes the end of a relay that was killed for the end of
  // the stream.
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
  return ends.map((end) => branchEnd(stem, end));
}

/**
 * The end of one who takes a stream, by that of the stream itself, which counts the bytes, and
 * whose failure has all killed.
 */
function branchEnd(
  stem: PromiseSettledResult<Piped>,
  end: PromiseSettledResult<Piped>,
): PromiseSettledResult<Piped> {
  const isOwn = end.status === "rejected" && !(end.reason instanceof Killed);
  if (stem.status === "rejected") return isOwn ? end : stem;
  if (end.status === "rejected") return end;
  return { ...end, value: { ...end.value, bytes: stem.value.bytes } };
}

/** Opens a FIFO for writing as soon as somebody reads it; null if its reader ends before. */
async function heldOpen(pipe: string, reader: Promise<unknown>): Promise<number | null> {
  let over = false;
  reader.catch(() => {}).finally(() => (over = true));
  for (; !over; await new Promise((later) => setTimeout(later, 5))) {
    const descriptor = openIfRead(pipe);
    if (descriptor !== null) return descriptor;
  }
  return null;
}

/** Opens a FIFO for writing; null as long as nobody reads it. */
function openIfRead(pipe: string): number | null {
  try {
    return openSync(pipe, constants.O_WRONLY | constants.O_NONBLOCK);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENXIO") throw error;
    return null;
  }
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

/**
 * What the processes of a guarded stream say on descriptor 3, a line each. Two are questions, which
 * guard answers with a line on descriptor 4, or not at all: what the stream begins with (name,
 * UUID, and its parent's, null in full); and that it is whole, with so many bytes. `unpacked`:
 * zstd's exit status.
 */
type Said =
  | { readonly unpacked: number }
  | { readonly begins: readonly [string, string, string | null] }
  | { readonly whole: number }
  | { readonly refused: string };

/**
 * Passes standard input on, and tells what has passed. A process of its own, which reads and writes
 * with blocking calls, so that no byte waits for anything else, and which any signal ends at once:
 * with a handler, a signal would not end such a call. Where it fails, its starter kills those who
 * read from it while its standard output is still open; those behind FIFOs it kills itself.
 */
function relay(given: Relay): never {
  try {
    const passed = passOn(given);
    if (given.tell !== undefined) writeFileSync(given.tell, JSON.stringify(passed));
    process.exit(0);
  } catch (error) {
    for (const { group } of given.to ?? []) sendSignal(-group, "SIGKILL");
    const { code, message } = error as NodeJS.ErrnoException;
    const isRefused = error instanceof Refused;
    try {
      // Whoever takes a guarded stream has ended before, and tells why itself.
      if (given.guarded !== undefined && code === "EPIPE") process.exit(0);
      if (given.guarded !== undefined && isRefused) tellGuard({ refused: message });
      else
        writeSync(
          2,
          `${isRefused ? `the stream is refused: ${message} (--trust-stream receives it as it is)` : message}\n`,
        );
    } catch {
      // nobody listens
    }
    process.exit(1);
  }
}

function tellGuard(what: Said): void {
  const line = Buffer.from(`${JSON.stringify(what)}\n`);
  writeAll(3, line, line.length);
}

/** Asks guard, and waits for its answer. Errors: Refused without one. */
function askGuard(question: Said): void {
  tellGuard(question);
  if (readSome(4, Buffer.alloc(1), 0, 1) === 0) refuse("guard does not allow it");
}

/** The check of a stream that the relay was asked for, if any. */
function checkFor({ check, guarded }: Relay): Checking | null {
  if (guarded?.stream) return streamCheck((...begins) => askGuard({ begins }));
  return check === undefined ? null : streamCheck(expecting(check), check.alone);
}

function passOn(given: Relay): Passed {
  const { rate, guarded } = given;
  const BLOCK = 2 ** 20;
  const most = rate === undefined ? BLOCK : Math.min(BLOCK, Math.max(4096, Math.ceil(rate / 10)));
  const room = Buffer.allocUnsafe(2 * BLOCK);
  const checking = checkFor(given);
  const state = guarded === undefined ? null : openSync(guarded.state, "w");
  const mark = (letter: "r" | "w") => state !== null && writeSync(state, letter, 0);
  const outlet = openOutlet(given);
  let have = 0;
  for (let n; mark("r"), (n = readSome(0, room, have, most)) > 0;) {
    mark("w");
    have += n;
    if (outlet.bytes() + have > (guarded?.most ?? Infinity)) refuse(guarded?.refusal as string);
    const end = checking === null ? have : checking.pass(room, 0, have);
    outlet.send(room, end);
    room.copyWithin(0, end, have);
    have -= end;
  }
  mark("w");
  checking?.finish();
  if (guarded !== undefined) askGuard({ whole: outlet.bytes() + have });
  outlet.send(room, have);
  return outlet.end();
}

/** The way out of a relay, which sums and counts the bytes, slows them down, and tells of them. */
function openOutlet({ sum, rate, tell, drop, to }: Relay) {
  const hash = sum ? createHash("sha256") : null;
  const tellBytes = (waiting: readonly number[] = []) => {
    toldAt = performance.now();
    if (tell !== undefined) writeFileSync(`${tell}.now`, [bytes, ...waiting].join(" "));
  };
  const isDue = () => performance.now() - toldAt > 500;
  const outputs = to && openOutputs(to, (waiting) => isDue() && tellBytes(waiting));
  widen([0, ...(outputs?.descriptors ?? [1])]);
  const began = performance.now();
  let [bytes, toldAt] = [0, began];
  return {
    bytes: () => bytes,
    send(room: Buffer, end: number): void {
      if (end === 0) return;
      hash?.update(room.subarray(0, end));
      const hadToWait = outputs?.write(room, end) ?? false;
      if (outputs === undefined && !drop) writeAll(1, room, end);
      bytes += end;
      if (hadToWait) tellBytes(); // nobody does any more
      if (rate !== undefined) pause((1000 * bytes) / rate - (performance.now() - began));
      if (isDue()) tellBytes();
    },
    end(): Passed {
      tellBytes();
      return { bytes, sum: hash?.digest("hex") ?? null };
    },
  };
}

/**
 * Gives pipes room for 1 MiB, of which each has 64 KiB by itself: storing a stream takes a quarter
 * less time so. 1031 is F_SETPIPE_SZ of fcntl(2). Only under Bun, which the executable is made of;
 * elsewhere, a pipe stays as it is, and so does anything else.
 */
function widen(descriptors: readonly number[]): void {
  type Fcntl = (descriptor: number, command: number, value: number) => number;
  type Library = { readonly symbols: { readonly fcntl: Fcntl } };
  type Loader = { readonly dlopen: (name: string, symbols: object) => Library };
  const { Bun: bun } = globalThis as { Bun?: { readonly FFI?: Loader } };
  try {
    const fcntl = { args: ["int", "int", "int"], returns: "int" };
    const library = bun?.FFI?.dlopen("libc.so.6", { fcntl });
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
function readSome(descriptor: number, room: Buffer, from: number, most: number): number {
  for (;;)
    try {
      return readSync(descriptor, room, from, Math.min(most, room.length - from), null);
    } catch (error) {
      if (!isBusy(error)) throw error;
      pause(1); // somebody else set it so that it does not block
    }
}

function writeAll(descriptor: number, bytes: Buffer, end: number): void {
  for (let done = 0; done < end;)
    try {
      done += writeSync(descriptor, bytes, done, end - done);
    } catch (error) {
      if (!isBusy(error)) throw error;
      pause(1);
    }
}

/**
 * Several outputs, each fed as it takes. `write` returns whether all had to wait for some, which
 * `tell` gets again and again. An output that nobody reads any more drops out, and its reader tells
 * why itself; so does one whose pipe was removed.
 */
function openOutputs(
  to: NonNullable<Relay["to"]>,
  tell: (waiting: readonly number[]) => void,
): { write: (bytes: Buffer, end: number) => boolean; readonly descriptors: readonly number[] } {
  type Output = {
    readonly number: number;
    readonly path: string;
    descriptor: number;
    done: number;
  };
  // Deno tells nothing of a part that was taken: there, as much as is taken whole or not at all,
  // PIPE_BUF of pipe(7).
  const most = process.versions["deno"] === undefined ? Infinity : 4096;
  const opened = performance.now();
  const openRead = (path: string, group: number): number => {
    for (; ; pause(1)) {
      const descriptor = openIfRead(path);
      if (descriptor !== null) return descriptor;
      // Its reader has not begun, or will not.
      if (!isRunning(group) || performance.now() - opened > 60e3) return -1;
    }
  };
  let open = to.map(({ path, group }, number): Output => {
    return { number, path, descriptor: openRead(path, group), done: 0 };
  });
  const close = (output: Output) => {
    if (output.descriptor !== -1) closeSync(output.descriptor);
    output.descriptor = -1;
  };
  /** Whether an output took something. */
  const feed = (output: Output, bytes: Buffer, end: number): boolean => {
    const { descriptor, done } = output;
    try {
      output.done += writeSync(descriptor, bytes, done, Math.min(end - done, most));
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
      for (const output of open) output.done = 0;
      for (let wait = 0.05; ;) {
        const waiting = open.filter(({ descriptor, done }) => descriptor !== -1 && done < end);
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

// ── 8. Commands ──────────────────────────────────────────────────────────────────────────

// ── run: a snapshot, sent to every destination, and both sides pruned ──

export type RunOptions = ReturnType<typeof runOptions>;

/** Which subvolume of a tree a run is about, by its path below SOURCE, and what all of them share. */
export type Member = {
  readonly path: string;
  /** Its snapshot, which was taken with those of all others. */
  readonly taken: Snapshot | null;
  /** For SOURCE itself, the paths of the others. */
  readonly below: readonly string[];
  /** Lets so many streams flow at a time. */
  readonly jobs: ReturnType<typeof atMost>;
};

/** Whether a subvolume is one below a tree's SOURCE. */
const isMemberBelow = (member: Member | null) => member !== null && member.path !== "";

/** A destination of a run; `recorded`: only --locked-dests asks for it. */
export type Wanted = {
  readonly location: Location;
  readonly optional: boolean;
  readonly recorded?: true;
  readonly policy: Policy | null;
  readonly minFree: MinFree | null;
  readonly sending: Sending;
};

/** Takes a snapshot, sends every destination what it lacks, and keeps what should be kept. */
export async function run(o: RunOptions, report: Report): Promise<void> {
  checkPlaces(o);
  const taken: BackedUp[] = [];
  await persistently(o, report, async (attempt, attemptReport) => {
    const open = (locked: () => void) => openFinished(attempt, locked);
    const snapshot = attempt.snapshot && taken.length === 0;
    const wanted = { ...attempt, snapshot };
    const one = attempt.recursive
      ? await backUpTree(wanted, attemptReport)
      : await backUp(open, wanted, attemptReport);
    if (one !== null) taken.push(one);
  });
  concludeRun(o, report, taken[0]?.name ?? null);
  for (const line of taken[0]?.words ?? []) log.info(line);
  if (o.metrics !== null && !o.dryRun)
    await writeMetrics(o.metrics, metricsOf(o.source.id, report.figures, Date.now()));
}

/** Refuses a destination in or above the snapshot folder by name alone, before any is opened. */
function checkPlaces(o: Pick<RunOptions, "source" | "snapshotFolder" | "destinations">): void {
  const folder = resolve(o.source.path, o.snapshotFolder);
  const host = JSON.stringify(o.source.host);
  for (const { location } of o.destinations)
    if (
      isDirectory(location) &&
      JSON.stringify(location.host) === host &&
      areNested(location.path, folder)
    )
      throw nestedError(location.id);
}

const areNested = (a: string, b: string) => isWithin(a, b) || isWithin(b, a);
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
): Promise<BackedUp | null> {
  let ahead = new Map<string, Ahead>();
  const opening = open(() => ahead.forEach(({ go }) => go()));
  if (o.transfer || !o.removeLocks) ahead = beginOpening(o);
  stamp(new Date()); // the first local time takes long, since zones are loaded for it: meanwhile
  try {
    return await backUpOpened(await begunSession(await opening, ahead, o, report));
  } finally {
    await whileCleaning(() => allOf([...ahead.values()].map(({ drop }) => drop())));
  }
}

/** Backs up an opened source, and closes it and its destinations. */
async function backUpOpened(session: Session): Promise<BackedUp | null> {
  const { o, report, source } = session;
  lookAtPins(session);
  let openings: Openings = [];
  let all: readonly Served[] = [];
  let taken: readonly Snapshot[] = [];
  const began = Date.now();
  try {
    warnOfSource(session);
    if (!o.dryRun)
      await clearCompared(source).catch(afterFailure(({ message }) => report.warning(message)));
    if (o.transfer || !o.removeLocks) openings = openAll(session);
    const opened = await openedAtOnce(openings);
    if (opened === null) {
      await openedInTime(session, openings, []); // which tells why
      return null;
    }
    if (await isOutOfReach(session, openings)) return null;
    if (o.snapshot) taken = await newSnapshots(session, openings, opened);
    all = await openedInTime(session, openings, taken);
    taken = await admitted(session, taken, all);
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
  tellLast(session);
  const here = figuresOf(report.figures, null);
  here.seconds += (Date.now() - began) / 1000;
  here.free = source.place.free;
  const newest = taken.at(-1);
  return newest === undefined ? null : { name: newest.name, words: firstWords(session) };
}

/** Tells when each destination was last served. */
function tellLast({ report, wanted, known }: Session): void {
  for (const id of wanted.keys()) figuresOf(report.figures, id).last = known.get(id)?.last ?? null;
}

/** The snapshot that a run took, and what is to be said of it at the end. */
type BackedUp = { readonly name: string; readonly words: readonly string[] };

/** After the first run of a source, where its snapshots are, and what can be done with them. */
function firstWords({
  o,
  source: { id, path, snapshots },
  wanted,
}: Pick<Session, "o" | "source"> & {
  readonly wanted: ReadonlyMap<string, unknown>;
}): readonly string[] {
  if (o.dryRun || snapshots.length > 0) return [];
  const [from = id] = wanted.keys();
  return [
    `The snapshots of ${id} are in ${path}: directories that can be looked into, and nothing there can be changed`,
    `Next: btrfs-backup list ${shellWord(id)}; btrfs-backup versions FILE; btrfs-backup restore ${o.recursive ? "--recursive " : ""}${shellWord(from)} NEW`,
  ];
}

/** One attempt of a run: all that its steps share. */
type Session = ReturnType<typeof newSession>;

/** Begins an attempt with an opened source, which is closed where that fails. Errors: Failure. */
async function begunSession(...given: Parameters<typeof newSession>): Promise<Session> {
  try {
    return newSession(...given);
  } catch (error) {
    await whileCleaning(given[0].close);
    throw error;
  }
}

function newSession(source: Source, ahead: Map<string, Ahead>, o: RunOptions, report: Report) {
  const known = new Map(knownDestinations(source).map((one) => [one.location, one]));
  const wanted = wantedIn(source, known, o, report);
  for (const id of [null, ...wanted.keys()]) figuresOf(report.figures, id); // in their order
  for (const [id, one] of wanted) {
    const before = known.get(id);
    if (before !== undefined && !one.recorded) known.set(id, asOptional(before, one.optional));
  }
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
    unchanged: source.owned.unchanged,
    inquiry: inquiryInto(source),
    display: displayOf(o),
    /** Lets so many streams flow at a time. */
    jobs: o.member?.jobs ?? atMost(o.jobs),
    /** All that can be sent; the new one joins them under its final name. */
    snapshots: source.snapshots.filter(({ readonly }) => readonly),
    /** The names that the clock leapt to, and that somebody vouched for. */
    leaps: source.owned.leaps,
    /** What snapshots were taken over from, by UUID; and where from, by what this run took over. */
    imported: new Map(Object.entries(source.owned.imported ?? {})),
    takenFrom: new Map<string, string>(),
    /** Snapshots of SOURCE that others took, in another folder: parents, and no more. */
    beyond: [] as readonly Snapshot[],
    /** What a destination has of these in other folders of a tree. */
    elsewhere: async (_id: string): Promise<readonly Entry[]> => [],
  };
}

/** What is known of a destination that may be away, or may not. */
function asOptional(
  { optional: _, ...known }: KnownDestination,
  optional: boolean,
): KnownDestination {
  return { ...known, ...(optional ? { optional } : {}) };
}

/** The destinations of the command line, and with --locked-dests of the source's record. */
function wantedIn(
  source: Source,
  known: ReadonlyMap<string, KnownDestination>,
  o: RunOptions,
  report: Report,
): Map<string, Wanted> {
  const wanted = new Map(o.destinations.map((one) => [one.location.id, one]));
  const doubt = whyNotBelieved(source);
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
        minFree: o.minFree,
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

/**
 * What is known of destinations: as the record had them, then new ones as the command line names
 * them, whichever was served first.
 */
function knownInOrder({ o, source, known }: Session): KnownDestination[] {
  const recorded = (source.chain.destinations ?? []).map(({ location }) => location);
  const order = [...recorded, ...o.destinations.map(({ location }) => location.id)];
  const rank = ({ location }: KnownDestination) => order.indexOf(location);
  return [...known.values()].sort((a, b) => rank(a) - rank(b));
}

async function writeKnown(session: Session): Promise<void> {
  const { o, source, known, leaps, unchanged } = session;
  const { imported: _, ...owned } = source.owned;
  const chain = {
    ...owned,
    ...(leaps === undefined ? {} : { leaps }),
    ...importedOf(session),
    ...(unchanged === undefined ? {} : { unchanged }),
    ...(known.size > 0 || source.chain.destinations ? { destinations: knownInOrder(session) } : {}),
  };
  // What 0.3.1 made has no owner until a run has said whose it is, and a copy cannot; a disk of
  // backups can be mounted read-only.
  const isSilent =
    source.source === null &&
    (source.owned.owner === undefined || placeOn(source.mounts, source.path).mount.readonly);
  if (o.dryRun || isSilent || JSON.stringify(chain) === session.written) return;
  if (isMemberBelow(o.member) && !o.snapshot && isOnlyTime(source.chain, chain)) return;
  try {
    await writeRecord(source, chain);
  } catch (error) {
    if (unchanged === source.owned.unchanged) throw error;
    checkInterruption();
    // The guard of an older release refuses what it does not know; the rest counts more.
    log.debug(messageOf(error));
    session.unchanged = source.owned.unchanged;
    return writeKnown(session);
  }
  session.written = JSON.stringify(chain);
}

/** Whether a record would say no more than that destinations were served again, soon after. */
function isOnlyTime(before: ChainRecord, after: ChainRecord): boolean {
  const timeless = ({ destinations = [], ...chain }: ChainRecord): ChainRecord => ({
    ...chain,
    destinations: destinations.map((one) => ({ ...one, last: null })),
  });
  const isSoon = (before.destinations ?? []).every(
    ({ last }) => last !== null && Date.now() - Date.parse(last) < SERVED_AGAIN_MS,
  );
  return isSoon && sameRecord(timeless(before), timeless(after));
}

/** Begins to look at what is mostly the next parent, while the destinations are opened. */
function lookAtPins({ o, source, inquiry, wanted, known }: Session): void {
  if (!o.transfer || source.alone) return;
  const pins = new Set([...wanted.keys()].map((id) => known.get(id)?.pin?.uuid));
  const newest = source.snapshots.at(-1)?.uuid;
  if (!o.snapshot && pins.size === 1 && pins.has(newest)) return; // mostly nothing is sent
  const parents = source.snapshots.filter(
    (one) => pins.has(one.uuid) && changedSince(one, inquiry, {}) === undefined,
  );
  void learnOfParents(inquiry, parents, []).catch(() => {});
}

function warnOfSource(session: Session): void {
  const { o, report, source, wanted } = session;
  warnOfNested(source, session);
  warnOfDuplicates(source, report);
  const asked = [...wanted.values()].filter(({ policy }) => policy !== null);
  if (asked.length > 0 && !asked.some(({ location }) => isReadable(location)))
    report.warning(
      "--num-backups: a shell:// command cannot be asked what it has, nor told to delete",
    );
  const tomorrow = wallClock(new Date()) + DURATION.d;
  const future = source.snapshots.filter(({ time }) => time > tomorrow).map(({ name }) => name);
  if (future.length > 0)
    report.warning(
      `${plural(future.length, "snapshot")} of ${o.source.id} ${future.length === 1 ? "is" : "are"} dated in the future: ${someOf(future, 3)}; is the clock right?`,
    );
  tellUnreadable({ o, source }, report);
}

/** Tells that SOURCE's record cannot be read. */
function tellUnreadable({ o, source }: Pick<Session, "o" | "source">, report: Report): void {
  const { unreadable } = source.record;
  if (unreadable !== null)
    report.error(
      null,
      new Failure(
        `${source.path}/.btrfs-backup.json cannot be read (${unreadable}): nothing is deleted at the source; "btrfs-backup unpin --all ${o.source.id}" moves it aside`,
      ),
    );
  for (const { name, readonly } of source.snapshots)
    if (!readonly)
      report.warning(
        `${source.path}/${name} is writable: it is not sent, not counted and not deleted`,
      );
}

/**
 * Warns of subvolumes below SOURCE: a snapshot has empty directories in their place. Snapshots that
 * others took are none of these.
 */
function warnOfNested(
  { source, subvolumes, top, subvolume }: Source,
  { o: { recursive, importFrom }, report }: Pick<Session, "o" | "report">,
): void {
  if (source === null || recursive) return;
  const others = relative(subvolume, importFrom ?? subvolume);
  const above = source.top === "/" ? "/" : `${source.top}/`;
  const paths = subvolumes
    .map(({ path }) => `/${path}`)
    .filter((path) => path.startsWith(above) && !isWithin(path, top))
    .map((path) => path.slice(above.length))
    .filter((path) => others === "" || !isWithin(path, others));
  if (paths.length > 0)
    report.warning(
      `${plural(paths.length, "subvolume")} below ${subvolume} ${paths.length === 1 ? "is" : "are"} not part of its snapshots: ${someOf(paths, 3)}; --recursive backs up all of them`,
    );
}

const someOf = (words: readonly string[], most: number, between = ", ") =>
  [...words.slice(0, most), ...(words.length > most ? ["…"] : [])].join(between);

// ── run: opening the source ──

/** A subvolume with its snapshot folder; `owned`: the folder's record, with it as the owner. */
type Source = Folder & {
  readonly identity: SourceIdentity;
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
    if (error instanceof MountedUnfinished) {
      await finishBesideMounted(o.source, o.hosts);
      // What had not begun to change names is a leftover, which the next restore clears.
      return openSource(o, locked, true);
    }
    const [, path] =
      (error instanceof Unfinished &&
        /: (\/.*)\.restoring-\d{8}-\d{6}\/\.btrfs-backup\.finishing$/s.exec(error.message)) ||
      [];
    if (path === undefined || o.dryRun) throw error;
    await finishRestores(o.source, path, o.hosts);
    return openSource(o, locked);
  }
}

/**
 * Errors: where SOURCE is a mount point, MountedUnfinished for a restore that was interrupted; Failure
 * where the subvolume there has been replaced.
 */
function checkMounted(
  { source, mounts, subvolumes }: Folder,
  id: string,
  isFinished: boolean,
): void {
  const mount = mounts.findLast(({ path }) => path === source?.path);
  if (mount === undefined || mount.root === "/") return;
  const root = replacedBy(mount, mounts, subvolumes);
  if (!isFinished && isUnfinished(root, subvolumes))
    throw new MountedUnfinished(`a restore was interrupted, and is not finished: ${id}`);
  if (root !== mount.root)
    throw new Failure(
      `${id} was restored, but the subvolume that was replaced, ${mount.root.slice(1)}, is still mounted there: ${mount.path === "/" ? "reboot" : `umount ${quote(mount.path)} && mount ${quote(mount.path)}`}`,
    );
}

/** Opens SOURCE and locks its snapshot folder. Errors: those of checkSource, Busy, Failure. */
async function openSource(
  o: Pick<
    RunOptions,
    | "source"
    | "snapshotFolder"
    | "prefix"
    | "hosts"
    | "wait"
    | "dryRun"
    | "adopt"
    | "fsChecks"
    | "recursive"
    | "member"
  >,
  locked?: () => void,
  isFinished = o.dryRun,
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
    checkMounted(opened, o.source.id, isFinished);
    // A folder inside SOURCE is SOURCE's own; one outside could be another's as well.
    const isInside = opened.source !== null && isWithin(opened.top, opened.source.top);
    strangers = isInside || !isSubvolumeItself(opened) ? null : strangersBeside(opened, path, o);
  });
  return sourceIn(folder, strangers);
}

/** Whether SOURCE is a subvolume, and no plain directory that holds some. */
const isSubvolumeItself = ({ source }: Pick<Folder, "source">) => source?.inode === 256;

/** A source in its opened snapshot folder, where `strangers` (if any are known) are not its own. */
function sourceIn(folder: Folder, strangers: readonly string[] | null): Source {
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
  { source, place, subvolumes, top }: Folder,
  path: string,
  {
    source: { id },
    fsChecks,
    recursive,
    snapshotFolder,
  }: Pick<RunOptions, "source" | "fsChecks" | "recursive" | "snapshotFolder">,
): void {
  if (source?.filesystem === null && fsChecks) throw new UsageError(`not on btrfs: ${id}`);
  const isPlain = source?.inode !== 256;
  if (isPlain && recursive && !snapshotFolder.startsWith("/"))
    throw new UsageError(
      `${id} is a plain directory: where do the snapshots of the subvolumes below it go? Give -f an absolute path, on the same filesystem`,
    );
  if (source === null || (isPlain && !recursive))
    throw new UsageError(
      `not a subvolume: ${id}${source ? subvolumeAround(source, subvolumes) : ""}`,
    );
  if (place.filesystem !== source.filesystem)
    throw new UsageError(`the snapshot folder ${path} is not on the filesystem of ${id}`);
  // What is in the snapshot folder is left out, and that would be all.
  if (recursive && isWithin(source.top, top))
    throw new UsageError(
      `the snapshot folder ${path} is ${id} or above it, and no subvolume in it is backed up: give -f another one`,
    );
}

/** What to do with a directory that is not a subvolume: which one it lies in, and how to make it one. */
export function subvolumeAround(
  { path, top }: Pick<Place, "path"> & { readonly top: string },
  subvolumes: readonly Pick<Subvolume, "path">[],
): string {
  const above = subvolumes
    .map((one) => `/${one.path}`)
    .filter((one) => isWithin(top, one))
    .reduce((longest, one) => (one.length > longest.length ? one : longest), "");
  const inside = top.slice(above.length);
  const around = path.endsWith(inside) ? path.slice(0, path.length - inside.length) || "/" : null;
  const it = shellWord(path);
  const old = shellWord(`${path}.old`);
  const made = `mv ${it} ${old} && btrfs subvolume create ${it} && cp -a --reflink=always ${shellWord(`${path}.old/.`)} ${it}`;
  return `${around === null ? "" : `; it is a directory in the subvolume ${around}`}. Back up that one, or make a subvolume of it: ${made}`;
}

/** Other sources' snapshots in a snapshot folder outside SOURCE. Errors: Failure. */
function strangersBeside(
  folder: Folder,
  path: string,
  { adopt, member }: Pick<RunOptions, "adopt" | "member">,
): readonly string[] {
  const { source, chain, snapshots, subvolumes, alone } = folder;
  const all = byUuid(subvolumes);
  const origin = all.get(source?.uuid ?? "")?.parentUuid;
  // What --import takes over is a snapshot of a snapshot.
  const grandparent = (parentUuid: string | null) => all.get(parentUuid ?? "")?.parentUuid ?? null;
  const isCopy = (parentUuid: string | null) =>
    source !== null &&
    parentUuid !== null &&
    (parentUuid === origin || grandparent(parentUuid) === source.uuid);
  const children = snapshots.filter(
    ({ uuid, parentUuid }) => parentUuid === source?.uuid || uuid === origin || isCopy(parentUuid),
  );
  const identity = identityOf(folder);
  const claimed = judgeClaim({
    identity,
    chain,
    standing: snapshots,
    shared: children,
    adopt,
    isMember: isMemberBelow(member),
  });
  if (!claimed.accepted) throw new Failure(`${path}: ${refusalMessage(claimed)}`);
  if (alone && claimed.strangers.length > 0)
    needRoot(folder, "telling other sources' snapshots in that folder");
  return claimed.strangers;
}

/** SOURCE as a record names it. Without root, its UUID is the recorded one of its path. */
function identityOf({ source, hostName, alone, chain: { owner } }: Folder): SourceIdentity {
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
function whyNotBelieved(
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
 * Opens places side by side. Those of one host are opened one after another, since the first one's
 * connection serves the others: that of a short command would not end as long as another place is
 * open through it. And all of them are if locks are waited for, so that two runs cannot wait for
 * each other; `wait` is how long.
 */
function openingTurns(wait: number) {
  const queues = new Map<string, Promise<unknown>>();
  return <T>(location: Location, open: () => Promise<T>): Promise<T> => {
    const isRemote = isReadable(location) && location.host !== null;
    const own = isRemote ? JSON.stringify(location.host) : location.id;
    const queue = wait > 0 ? "" : own;
    const opened = (queues.get(queue) ?? Promise.resolve()).then(open);
    queues.set(queue, endOf(opened, null));
    return opened;
  };
}

/** Opens the destinations, sorted by name. */
function openAll(session: Session): Openings {
  const { o, wanted, known } = session;
  const inTurn = openingTurns(o.wait);
  const sorted = [...wanted].sort(([a], [b]) => (a < b ? -1 : 1));
  return sorted.map(([id, one]) => {
    const asked = { ...one, id, known: known.get(id) };
    return { asked, destination: inTurn(one.location, () => openDestination(session, asked)) };
  });
}

/** Closes what is being opened, if it is. */
const closed = (opening: Promise<Pick<Folder, "close">>) =>
  opening.then(
    (opened) => opened.close(),
    () => {},
  );

/** How long new destinations may take, in ms, before the snapshot is taken all the same. */
const LOOK_MS = 5e3;

/**
 * The destinations that are open before the snapshot is taken. The snapshot waits only for new ones
 * on this host, since nothing that makes no sense should take one. Errors: UsageError.
 */
async function openedAtOnce(openings: Openings): Promise<readonly Destination[] | null> {
  const opened: Destination[] = [];
  for (const { destination } of openings)
    destination.then(
      (one) => opened.push(one),
      () => {},
    );
  const fresh = openings.filter(
    ({ asked: { known, location } }) =>
      known === undefined && isDirectory(location) && location.host === null,
  );
  const looked = Promise.all(
    fresh.map(({ asked, destination }) =>
      destination.then(
        () => true,
        (error: unknown) => {
          if (error instanceof UsageError || error instanceof Interrupted) throw error;
          return error instanceof Busy || (error instanceof Absent && asked.optional);
        },
      ),
    ),
  );
  const possible = (await isOverWithin(LOOK_MS, looked)) ? await looked : [true];
  const isHopeless =
    openings.length > 0 && fresh.length === openings.length && !possible.includes(true);
  return isHopeless ? null : opened;
}

/**
 * The destinations that can be served, when all have been opened; what fails is reported. Errors:
 * UsageError, Interrupted.
 */
async function openedInTime(
  session: Session,
  openings: Openings,
  taken: readonly Snapshot[],
): Promise<Served[]> {
  const snapshots = [...session.snapshots, ...taken];
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
function skip(
  { o: { maxAge }, report }: Pick<Session, "o" | "report">,
  { id, known }: Pick<Asked, "id" | "known">,
  { message }: Absent,
): void {
  const last = known?.last ?? null;
  if (
    maxAge !== null &&
    (last === null || Date.parse(last) < momentBefore(Date.now(), maxAge.count, maxAge.unit))
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
    if (!isDirectory(location)) continue;
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
      return isOverWithin(5000, closed(folder)); // on a dead disk nothing ends
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
  if (isReadable(location)) return OPENERS[location.kind](session, { ...asked, location });
  const lock = lockAtSource(session, location.id);
  return shellDestination(location, {
    last: known?.pin ?? null,
    interpreter: await commandShell(report),
    lock,
    prefix: o.prefix,
    source: o.source.id,
    below: o.member?.path ?? "",
    sending,
  });
}

const OPENERS = {
  folder: openBackups,
  raw: openStore,
  rclone: openStore,
} satisfies Record<Readable["kind"], typeof openStore>;

/** The lock for a destination where nothing can be locked. A remote source's one is here. */
function lockAtSource({ o, source }: Session, id: string): string {
  if (o.source.host !== null) return lockFile(`${o.source.id}\n${o.prefix}\n${id}`);
  // Through the process that holds the folder, it is found behind the fence.
  const isHeld = source.fenced && source.holder !== "";
  const folder = isHeld ? join(`/proc/${source.holder}/cwd`, source.within) : source.path;
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
  const folder = await openNew(
    location,
    { source, isKnown: known !== undefined },
    { ...opening, begun: begun?.folder },
    check,
  );
  const lookAgain = () => openFolder(location, folder.path, { ...opening, wait: "look" });
  return { folder, lookAgain };
}

/** Opens a folder of backups, and writes its record, if it is the right one. */
async function openBackups(session: Session, asked: AskedPlace): Promise<Destination> {
  const { o, report, source } = session;
  const { known, sending } = asked;
  let strangers: readonly string[] = [];
  const { folder, lookAgain } = await openPlace(session, asked, (opened) => {
    checkBackups(session, asked, opened);
    strangers = strangersAmong(session, opened);
    compressionBetween(source, opened, sending.level);
  });
  const { receiving: announced, since: _, ...settled } = folder.chain;
  // An announcement outlives its transfer only as long as its leftover is to be told by it.
  const isBroken = folder.snapshots.some(({ name, readonly }) => name === announced && !readonly);
  const taken = ownedBy(source.identity, isBroken ? folder.chain : settled, strangers);
  const isTop = o.member?.path === "" && source.owned.tree !== undefined;
  const owned = isTop ? { ...taken, tree: source.owned.tree } : taken;
  const { owner } = folder.chain;
  tellFormerOwner(session, folder, strangers);
  // Taken over, moved, or completed after all: the record says so even if nothing is sent.
  const isStanding = owner !== undefined || folder.snapshots.some(isComplete);
  // The data of what was completed after all must be on the disk before its announcement goes.
  if (!o.dryRun && isStanding && !sameRecord(folder.chain, owned))
    await writeRecord(folder, owned, announced !== undefined && !isBroken);
  warnOfDuplicates(folder, report);
  return folderDestination(folder, {
    again: lookAgain,
    owned,
    announced: whyNotBelieved(source) === null ? (known?.receiving ?? []) : [],
    elsewhere: await session.elsewhere(asked.id),
    ...o.deletion,
    btrfsDebug: o.btrfsDebug,
    sending,
  });
}

/** Tells where the backups of a folder were made, if it was elsewhere or by another subvolume. */
function tellFormerOwner(
  { o, source }: Session,
  { id, chain: { owner } }: Folder,
  strangers: readonly string[],
): void {
  const { uuid, host, path } = source.identity;
  if (owner === undefined) return;
  if (owner.uuid === uuid && (owner.host !== host || owner.path !== path))
    log.info(
      `${id}: its backups were made on ${owner.host}:${owner.path}; their source is ${host}:${path} now`,
    );
  if (owner.uuid !== uuid && isMemberBelow(o.member) && strangers.length > 0)
    log.info(
      `${id}: another subvolume is at ${path} now; ${plural(strangers.length, "backup")} of the former one stay${strangers.length === 1 ? "s" : ""}`,
    );
}

/** Errors: UsageError, Absent, Failure for a folder that is not the destination. */
function checkBackups(
  { o, source }: Pick<Session, "o" | "source">,
  asked: Asked,
  folder: Folder,
): void {
  const known = o.adopt ? undefined : asked.known;
  needRoot(folder, "receiving");
  const { filesystem } = folder.place;
  const isSame = filesystem !== null && filesystem === source.place.filesystem;
  if (isSame && areNested(folder.top, source.top)) throw nestedError(asked.location.id);
  needNoSource({ o, source }, asked, folder);
  if (filesystem === null && o.fsChecks) throw new Absent(`not on btrfs ${MOUNTED}`);
  if (known?.filesystem) checkFilesystem(folder, known.filesystem);
  if (isSame && o.fsChecks) throw sameFilesystem(source);
  // 0.3.1 remembered no filesystem: an empty place is not where its backups were.
  const isOld = known?.pin && known.filesystem === null;
  if (isOld && !folder.snapshots.some(isComplete))
    throw new Absent(`the backups that 0.3.1 made are not there ${MOUNTED}; --adopt begins anew`);
}

/**
 * Errors: UsageError for a DEST that was meant as one more SOURCE. Another DEST follows, it is a
 * subvolume that has nobody's backups, and either there are snapshots of it, as runs take them, or
 * it could not be a DEST anyway, since it lies on SOURCE's own filesystem, and is no mere place for a
 * mount.
 */
function needNoSource(
  { o, source }: Pick<Session, "o" | "source">,
  { id, known, optional }: Asked,
  folder: Folder,
): void {
  const isLast = o.destinations.at(-1)?.location.id === id;
  if (isLast || o.adopt || optional || known !== undefined || source.source === null) return;
  const { top, subvolumes, standing, record, place, entries } = folder;
  const own = subvolumes.find(({ path }) => `/${path}` === top);
  const isServed = [...record.chains.values()].some(({ owner }) => owner !== undefined);
  if (own === undefined || isServed || prefixesIn(standing).length > 0) return;
  const isEmpty = [...entries].every((name) => [".", "..", "*"].includes(name)); // as the shell tells
  const isSame = place.filesystem === source.place.filesystem && !isEmpty;
  const isOwnSnapshot = ({ path, parentUuid, receivedUuid }: Subvolume) =>
    parentUuid === own.uuid &&
    receivedUuid === null &&
    prefixOf(basename(path)) !== null &&
    dirname(`/${path}`) === resolve(top, o.snapshotFolder);
  if ((isSame && o.fsChecks) || subvolumes.some(isOwnSnapshot))
    throw new UsageError(
      `${id} looks like a second SOURCE: a command line has one SOURCE, and all else is DEST. For several, write the command line of each into a file /etc/btrfs-backup/NAME.args, and "btrfs-backup all" runs them; if backups shall go there, name a folder in it: ${join(id, "backup")}`,
    );
}

/** Errors: Absent where a place is not on one of these filesystems. */
function checkDisk({ place }: Folder, known: readonly string[]): void {
  if (known.length > 0 && !known.some((one) => one === place.filesystem))
    throw new Absent(
      `it lies on another filesystem (${place.filesystem}) than before (${known[0]}) ${MOUNTED}; --adopt accepts a replaced disk`,
    );
}

/** Errors: Absent where the backups do not stand on the filesystem that they were on. */
function checkFilesystem(folder: Folder, known: string): void {
  const { exists, chain, record } = folder;
  checkDisk(folder, [known]);
  if (!exists || (chain.owner === undefined && record.unreadable === null))
    throw new Absent(`what was backed up there is gone ${MOUNTED}; --adopt begins anew`);
}

/** The backups of other sources in a folder. Errors: Failure where the folder is not ours. */
function strangersAmong(
  { o, source }: Pick<Session, "o" | "source">,
  { snapshots, chain }: Pick<Folder, "snapshots" | "chain">,
): readonly string[] {
  const complete = snapshots.filter(isComplete);
  const here = dataFinder(source.snapshots);
  const shared = complete.filter((backup) => here(backup) !== undefined);
  const { identity } = source;
  const claimed = judgeClaim({
    identity,
    chain,
    standing: complete,
    shared,
    adopt: o.adopt,
    isMember: isMemberBelow(o.member),
  });
  if (!claimed.accepted) throw new Failure(refusalMessage(claimed));
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
      `${id}: ${plural(broken.length, "stream")} cannot be restored, since what ${broken.length === 1 ? "it builds" : "they build"} on is missing: ${broken[0]?.name}${broken.length > 1 ? " …" : ""}`,
    );
  return storeDestination(folder, {
    store,
    again: lookAgain,
    standing: standingInStore(store, o.prefix, lineages),
    owner: { ...owner, lineage: own.at(-1)?.owner.lineage ?? owner.lineage },
    lock,
    sending: asked.sending,
  });
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
  if (isDirectory(location)) needApart(session, location.id, folder);
  if (o.adopt) return;
  const { ours, own, owner } = streamsIn(folder, session);
  if (known?.pin && ours.length === 0)
    throw new Absent(`what was stored there is gone ${MOUNTED}; --adopt begins anew`);
  const isOwn = ({ owner: { uuid, place } }: Stream) =>
    uuid === owner.uuid || place === owner.place;
  // In a tree, a place below SOURCE is the owner, whatever subvolume is there by now.
  const mine = isMemberBelow(o.member) ? ours : own;
  if (ours.length > 0 && !mine.some(isOwn)) {
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
function needApart({ o, source }: Pick<Session, "o" | "source">, id: string, folder: Folder): void {
  if (
    sameHost(folder.host, source.host) &&
    folder.hostName === source.hostName &&
    areNested(folder.path, source.path)
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

/**
 * The snapshots that a run adds: one of now, if it is worth one, or those that others took. Errors:
 * none: they are reported.
 */
async function newSnapshots(
  session: Session,
  openings: Openings,
  opened: readonly Destination[],
): Promise<readonly Snapshot[]> {
  const { o, report } = session;
  const { importFrom, member } = o;
  try {
    if (member !== null)
      return member.taken === null ? [] : await unlessUnchanged(session, member.taken);
    if (importFrom !== null)
      return await betweenHooks(session, () => importSnapshots(session, openings, importFrom));
    const taken = await betweenHooks(session, () => snapshotOfNow(session, opened));
    return await unlessUnchanged(session, taken);
  } catch (error) {
    report.error(null, error);
    return [];
  }
}

/** One of several runs at a time: the hook of another could start what this one's has stopped. */
const oneWithHooks = atMost(1);

/** Does something between the user's own commands. Errors: Failure, and those of the work. */
function betweenHooks<T>(
  { o, report, source }: Pick<Session, "o" | "report" | "source">,
  work: () => Promise<T>,
): Promise<T> {
  if (o.beforeSnapshot === null && o.afterSnapshot === null) return work();
  const hook = async (command: string | null, option: string) => {
    if (command === null) return;
    if (o.dryRun) return log.info(`Would run ${option}: ${command}`);
    log.debug((await ask(plainHost(source.host), HOOK, { command }, `${option} failed`)).trim());
  };
  const after = () =>
    hook(o.afterSnapshot, "--after-snapshot").catch((error) => report.error(null, error));
  return oneWithHooks(async () => {
    checkInterruption();
    return await hook(o.beforeSnapshot, "--before-snapshot")
      .then(work)
      .finally(() => whileCleaning(after));
  });
}

/** Takes a snapshot in the first second whose name is free on both sides. Errors: Failure. */
async function snapshotOfNow(session: Session, opened: readonly Destination[]): Promise<Snapshot> {
  const { o, source } = session;
  const { identity, subvolume } = source;
  for (; ; await nextSecond()) {
    checkInterruption();
    const now = new Date();
    const name = snapshotName(o, now);
    // When clocks go back, a destination can still have the name.
    if (source.entries.has(name) || isTakenAt(opened, name)) continue;
    const moment = Math.floor(now.getTime() / 1000) * 1000;
    const made = {
      ...comingSnapshot(name, moment),
      time: wallClock(now),
      parentUuid: identity.uuid,
    };
    const taken = await snapshotOf(session, subvolume, made);
    if (taken !== null) return taken;
  }
}

/** A snapshot that is going to be taken. */
const comingSnapshot = (name: EntryName, moment: number): Snapshot => ({
  ...NO_SUBVOLUME,
  id: Number.MAX_SAFE_INTEGER,
  uuid: crypto.randomUUID(),
  name,
  time: timeIn(name) as number,
  moment,
  path: name,
  cgen: Number.MAX_SAFE_INTEGER,
});

/**
 * Takes a snapshot of the subvolume at a path, which must be the one that `made` says; null where
 * its name is taken. Errors: Failure.
 */
async function snapshotOf(
  { o, source, display }: Session,
  path: string,
  made: Snapshot,
): Promise<Snapshot | null> {
  if (o.dryRun) return made;
  const { identity, place, alone } = source;
  const { name, parentUuid } = made;
  const shown = await ask(
    source.host,
    SNAPSHOT,
    {
      source: path,
      ...at(source),
      name,
      ...(o.importFrom === null ? {} : { uuid: parentUuid ?? "" }),
    },
    `cannot take a snapshot of ${path}`,
  ).catch((error) => {
    if (error instanceof Taken) return null;
    throw error;
  });
  if (shown === null) return null;
  const uuid = shownField(shown, "UUID");
  // In the place of a snapshot, somebody else's directory can stand by now.
  const isChecked = !alone && identity.uuid !== place.filesystem;
  if (isChecked && shownField(shown, "Parent UUID") !== parentUuid)
    throw new Failure(`${join(source.path, name)} is not the snapshot that was taken: ${uuid}`);
  const size = /^\s+Usage referenced:\s+(\d+)/m.exec(shown)?.[1];
  if (size !== undefined) display.sizes.set(uuid, Number(size));
  return { ...made, id: Number(shownField(shown, "Subvolume ID")), uuid };
}

/** The new snapshots under their final names, told, and ready to be sent. */
async function admitted(
  session: Session,
  taken: readonly Snapshot[],
  all: readonly Served[],
): Promise<readonly Snapshot[]> {
  const { o, report, source, snapshots, takenFrom } = session;
  const final: Snapshot[] = [];
  for (const first of taken) {
    const isFixed = o.importFrom !== null || o.member !== null;
    const named = isFixed ? first : withFreeName(session, first, all);
    const one = await Promise.resolve(named).catch((error) => (report.error(null, error), first));
    final.push(one);
    snapshots.push(one);
    const from = takenFrom.get(one.uuid);
    const told = { name: one.name, path: join(source.path, one.name) };
    report.event("snapshot", from === undefined ? told : { ...told, from });
  }
  return final;
}

const snapshotName = ({ prefix }: Pick<RunOptions, "prefix">, date: Date) =>
  `${prefix}${stamp(date)}` as EntryName; // a prefix holds nothing that a name cannot

const isTakenAt = (all: readonly Pick<Destination, "standing">[], name: string) =>
  all.some(({ standing }) => standing.obstacles.has(name));

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

// ── run: whether a snapshot is worth taking ──

/**
 * With --if-reachable, whether no destination can be opened. It waits for them, and tells. Errors:
 * UsageError, Interrupted.
 */
async function isOutOfReach(session: Session, openings: Openings): Promise<boolean> {
  const { o } = session;
  if (!o.ifReachable || (await openedOnes(openings)).length > 0) return false;
  // That one which was served before is away is what the option is for. A new one may be misspelt.
  const away = openings.map(({ asked, destination }) => ({
    asked: { ...asked, optional: asked.optional || asked.known !== undefined },
    destination,
  }));
  await openedInTime(session, away, []);
  tellLast(session);
  log.info(`No snapshot of ${o.source.id} is taken: no destination can be opened`);
  return true;
}

/** The destinations that could be opened, when all have been tried. */
async function openedOnes(openings: Openings): Promise<readonly Destination[]> {
  const results = await Promise.allSettled(openings.map(({ destination }) => destination));
  return results.flatMap((one) => (one.status === "fulfilled" ? one.value : []));
}

/**
 * A new snapshot; with --if-changed none, and it is deleted again, where it is the same as the one
 * before. Errors: Failure where it cannot be deleted.
 */
async function unlessUnchanged(session: Session, taken: Snapshot): Promise<readonly Snapshot[]> {
  const { o, report, source } = session;
  const newest = source.snapshots.at(-1);
  const isTold = o.ifChanged && newest !== undefined;
  const condition = isTold ? `, if something has changed since ${newest.name}` : "";
  const tell = o.member === null ? log.info : log.debug;
  if (o.dryRun) tell(`Would take snapshot ${taken.name} of ${o.source.id}${condition}`);
  const isSame =
    isTold &&
    !o.dryRun &&
    (await isUnchanged(session, newest, taken).catch(
      afterFailure(({ message }) => {
        report.warning(`${taken.name} is kept: ${message}`);
        return false;
      }),
    ));
  if (!isSame) {
    if (!o.dryRun) tell(`Took snapshot ${taken.name} of ${o.source.id}`);
    return [taken];
  }
  await deleteFrom(source, [taken], { ...o.deletion, sync: false });
  session.unchanged = { uuid: newest.uuid, at: new Date().toISOString() };
  log.info(`Nothing has changed since ${newest.name}: no snapshot of ${o.source.id} is kept`);
  report.event("unchanged", { since: newest.name });
  return [];
}

/**
 * Whether a new snapshot is the same as the newest one of the chain. One that was edited, or
 * received by a restore, is no earlier state, and nothing is said of what was changed since.
 */
async function isUnchanged(
  { o, source, inquiry }: Session,
  newest: Snapshot,
  taken: Snapshot,
): Promise<boolean> {
  if (!newest.readonly || newest.receivedUuid !== null) return false;
  await learnOfParents(inquiry, [newest], []);
  return (
    isStillEarlier(newest, taken, inquiry) && isSameState(source, newest, taken, o.member?.below)
  );
}

/** How much of a difference is read to tell whether there is one, in bytes. */
const COMPARED = 65536;

/** Whether `btrfs send` finds nothing that differs between two snapshots of a folder. Errors: Failure. */
async function isSameState(
  folder: Folder,
  parent: Entry,
  snapshot: Entry,
  below: readonly string[] = [],
): Promise<boolean> {
  const { host, source, subvolumes, top } = folder;
  const names = { snapshot: snapshot.name, parent: parent.name, most: String(COMPARED) };
  const difference = await askBytes(
    host,
    REWRITTEN,
    { ...at(folder), ...names },
    `cannot tell whether anything has changed since ${parent.name}`,
  );
  const origin = subvolumes.find(({ uuid }) => uuid === snapshot.parentUuid);
  const above = origin === undefined ? (source?.top ?? "/") : `/${origin.path}`;
  const own = isWithin(top, above) ? relative(above, top) : null;
  try {
    return isOnlyFrame(difference, own, below);
  } catch (error) {
    if (difference.length >= COMPARED) return false;
    throw error;
  }
}

/** As `btrfs send` names what it makes, until it gets its own name. */
const ON_ITS_WAY = /^o\d+-\d+-\d+$/;

/**
 * Whether a difference holds no command besides its frame. What a run itself does in `own`, the
 * path of its folder in the subvolume, is no change of that: each run writes its record there, and
 * those of a tree's members in the paths `below`.
 * Errors: Failure for a difference that is cut off before anything tells.
 */
export function isOnlyFrame(
  difference: Buffer,
  own: string | null,
  below: readonly string[] = [],
): boolean {
  const { attribute } = streamCommands();
  const changes = own === null ? null : ownChanges(foldersOf(own, below));
  for (const { name, text } of commandsIn(difference)) {
    if (name === "snapshot") continue;
    if (name === "end") return changes === null || changes.areWhole();
    if (name === undefined || changes === null) return false;
    const to = name === "rename" ? text(attribute.pathTo) : "";
    if (!changes.has(name, text(attribute.path), to)) return false;
  }
  return false;
}

/** A folder, and those below it that a tree has, as a send stream names them. */
function foldersOf(own: string, below: readonly string[]): Set<string> {
  const folders = [own];
  for (const path of below)
    for (let inner = path; inner !== "."; inner = dirname(inner)) folders.push(join(own, inner));
  return new Set(folders.map((folder) => Buffer.from(folder).toString("latin1")));
}

/**
 * Tells of one command after the other whether it changes only this program's files in its folders,
 * which are made elsewhere, and renamed.
 */
function ownChanges(folders: ReadonlySet<string>) {
  const coming = new Set<string>();
  const isOwn = (path: string) =>
    coming.has(path) ||
    (basename(path).startsWith(".btrfs-backup.") && folders.has(dirname(`/${path}`).slice(1)));
  const renamed = (path: string, to: string) => {
    coming.delete(path);
    if (ON_ITS_WAY.test(to)) coming.add(to);
    return isOwn(to);
  };
  return {
    has: (name: string, path: string, to: string): boolean => {
      if (name === "mkfile" && ON_ITS_WAY.test(path)) coming.add(path);
      if (name === "utimes" && folders.has(path)) return true;
      if (!isOwn(path)) return false;
      if (name === "unlink") coming.delete(path);
      return name !== "rename" || renamed(path, to);
    },
    areWhole: () => coming.size === 0,
  };
}

// ── run: taking over what others took ──

/**
 * Takes over the snapshots of SOURCE that others took and that are newer than its newest one: a
 * snapshot of each, oldest first. Returns those that came before one that fails, which is reported.
 * Errors: Failure where nothing can be told of the directory, or nothing there is of SOURCE.
 */
async function importSnapshots(
  session: Session,
  openings: Openings,
  directory: string,
): Promise<readonly Snapshot[]> {
  const { o, report, source } = session;
  const { dir, plan } = await importPlanned(session, directory);
  session.beyond = parentsBeyond(source, plan.whole);
  // No moment is lost by waiting for the destinations, some of which may have a name already.
  const opened = await openedOnes(openings);
  const taken: Snapshot[] = [];
  for (const one of plan.coming) {
    checkInterruption();
    try {
      const imported = await importOne(session, join(dir, one.below), { one, taken, opened });
      taken.push(imported);
      const what = `${one.below} of ${dir} as ${imported.name}`;
      log.info(`${o.dryRun ? "Would take" : "Took"} over ${what}`);
    } catch (error) {
      if (await isGone(session, directory, one)) {
        log.info(`${join(dir, one.below)} was deleted meanwhile, and is not taken over`);
        continue;
      }
      // What is newer must not come before it.
      report.error(null, error);
      break;
    }
  }
  if (taken.length > 0) await save(session).catch(() => {}); // it has been told
  return taken;
}

/** Decides what is to be taken over from a directory. Errors: Failure. */
async function importPlanned(session: Session, directory: string) {
  const { o, source, inquiry } = session;
  needRoot(source, "--import");
  const { dir, subvolumes, found } = await foreignAt(session, directory);
  for (const one of subvolumes) inquiry.all.set(one.uuid, one);
  const { uuid } = source.identity;
  const plan = planImport(found, source.snapshots, { uuid, all: inquiry.all });
  checkImport(plan, o, dir);
  return { dir, plan };
}

/** Whether a snapshot is no more where it was. */
const isGone = (session: Session, directory: string, { uuid }: Foreign): Promise<boolean> =>
  foreignAt(session, directory).then(
    ({ found }) => !found.some((one) => one.uuid === uuid),
    afterFailure(() => false),
  );

/**
 * After a failure, drops the parents that others have deleted meanwhile. Errors: the failure, if
 * none of the differences that were asked about has such a one.
 */
async function forgetGone(
  session: Session,
  asked: readonly Pair[],
  failure: Failure,
): Promise<void> {
  const { o, beyond } = session;
  const foreign = asked.filter(({ parent }) => parent.beyond !== undefined);
  if (o.importFrom === null || foreign.length === 0) throw failure;
  const { found } = await foreignAt(session, o.importFrom);
  const there = new Set(found.map(({ uuid }) => uuid));
  if (foreign.every(({ parent }) => there.has(parent.uuid))) throw failure;
  session.beyond = beyond.filter(({ uuid }) => there.has(uuid));
}

/** Reads a directory of snapshots at the source's host. Errors: Failure. */
async function foreignAt({ source }: Session, directory: string) {
  const host: Host = { ...plainHost(source.host), fence: "try" };
  const nonce = crypto.randomUUID();
  const problem = `--import ${directory}: cannot be read`;
  return parseForeign(await ask(host, FOREIGN, { nonce, dir: directory }, problem), nonce);
}

const FORMS =
  "snapper's N/snapshot with N/info.xml, Timeshift's YYYY-MM-DD_HH-MM-SS/@, btrbk's NAME.YYYYMMDD (also with THHMM, or THHMMSS and a zone)";

/** Tells what is not taken over. Errors: Failure where nothing is there to take over at any time. */
function checkImport(
  { whole, older, writable, unrelated }: ImportPlan,
  { source: { id } }: Pick<RunOptions, "source">,
  dir: string,
): void {
  const tell = (some: readonly Foreign[], why: string) => {
    if (some.length === 0) return;
    const places = someOf(
      some.map(({ below }) => below),
      3,
    );
    log.info(
      `${plural(some.length, "snapshot")} in ${dir} ${some.length === 1 ? "is" : "are"} not taken over, ${why}: ${places}`,
    );
  };
  tell(older, "being older than the newest one here");
  tell(writable, "being writable (btrfs property set -ts PATH ro true makes one read-only)");
  tell(unrelated, `being no snapshots of ${id}`);
  if (whole.length > 0) return;
  throw new Failure(
    `--import ${dir}: no read-only snapshot of ${id} is there; looked for ${FORMS}${writable.length === 0 ? "" : `; ${writable.length} of them are writable`}${unrelated.length === 0 ? "" : `; ${unrelated.length} are of other subvolumes`}`,
  );
}

/** What is taken over, and what has names already. */
type Importing = {
  readonly one: Foreign;
  readonly taken: readonly Snapshot[];
  readonly opened: readonly Destination[];
};

/** Takes a snapshot of another one, under the first free name from its moment on. Errors: Failure. */
async function importOne(
  session: Session,
  path: string,
  { one, taken, opened }: Importing,
): Promise<Snapshot> {
  const { o, source, inquiry, imported, takenFrom } = session;
  const { uuid, id, parentUuid, cgen, words } = one;
  const isFree = (name: string) =>
    !source.entries.has(name) && !isTakenAt(opened, name) && !taken.some((it) => it.name === name);
  for (let { moment } = one; ; moment += 1000) {
    const name = snapshotName(o, new Date(moment));
    if (!isFree(name)) continue;
    const coming = { ...comingSnapshot(name, moment), parentUuid: uuid };
    const made = await snapshotOf(session, path, coming);
    if (made === null) continue;
    imported.set(made.uuid, {
      of: parentUuid ?? "",
      id,
      cgen: cgen ?? 0,
      ...(words === null ? {} : { words }),
    });
    takenFrom.set(made.uuid, path);
    if (o.dryRun) inquiry.ctransids.set(made.uuid, cgen ?? 0); // there is none to be looked at
    return made;
  }
}

/** Snapshots of SOURCE in another folder, as parents, in the order of their IDs. */
function parentsBeyond(source: Source, whole: readonly Foreign[]): Snapshot[] {
  return whole
    .flatMap(({ below: _, words: __, ...one }): Snapshot[] => {
      const beyond = beyondFolder(source, `/${one.path}`);
      const name = entryName(basename(one.path));
      if (beyond === null || name === null || /[\n\r]/.test(beyond)) return [];
      return [{ ...one, name, beyond, time: wallClock(new Date(one.moment)) }];
    })
    .sort((a, b) => a.id - b.id);
}

/** So many snapshots a record tells the origin of; a line has room for more than twice as many. */
const LISTED_IMPORTED = 200;

/** What a record says of snapshots that were taken over, as long as they are there. */
function importedOf({
  imported,
  takenFrom,
  snapshots,
}: Pick<Session, "imported" | "takenFrom" | "snapshots">): Pick<ChainRecord, "imported"> {
  const there = new Set(snapshots.map(({ uuid }) => uuid));
  const left = [...imported]
    .filter(([uuid]) => there.has(uuid) || takenFrom.has(uuid))
    .slice(-LISTED_IMPORTED);
  return left.length === 0 ? {} : { imported: Object.fromEntries(left) };
}

/**
 * What snapshots in a folder were taken over from, as the record tells of those that are gone. What
 * a guarded key wrote is nothing to go by for others.
 */
function originalsGone({ chain, host, subvolumes }: Folder): Subvolume[] {
  const { imported, guarded } = chain;
  if (imported === undefined || (guarded && host.ssh === null)) return [];
  return subvolumes.flatMap(({ uuid, parentUuid }) => {
    const told = imported[uuid];
    if (told === undefined || parentUuid === null) return [];
    const { of, id, cgen } = told;
    return [{ ...NO_SUBVOLUME, id, uuid: parentUuid, parentUuid: of, cgen }];
  });
}

/** Reads what FOREIGN printed. Errors: Failure. */
export function parseForeign(
  output: string,
  nonce: string,
): { readonly dir: string; readonly subvolumes: Subvolume[]; readonly found: Foreign[] } {
  const sections = sectionsOf(output, nonce);
  const section = (name: string) => {
    const text = sections.get(name);
    if (text === undefined || !sections.has("end"))
      throw new Failure(`the host does not print what it was asked for: ${name}`);
    return text;
  };
  const dir = section("dir");
  if (!PATH_SHAPE.test(dir) || dir !== withoutSlash(normalize(dir)))
    throw new Failure("the host does not print what it was asked for: dir");
  const { top } = placeOn(parseMounts(section("mounts")), dir);
  const subvolumes = parseSubvolumes(section("subvolumes"), section("readonly"));
  const told = parseInfos(section("snapper"));
  const found = subvolumes.flatMap((one): Foreign[] => {
    const path = `/${one.path}`;
    const below = isWithin(path, top) ? relative(top, path) : "";
    const number = /^(\d+)\/snapshot$/.exec(below)?.[1];
    const { date = null, words = null } = told.get(number ?? "") ?? {};
    const moment = number === undefined ? foreignMoment(below) : date;
    return moment === null ? [] : [{ ...one, below, moment, words }];
  });
  return { dir, subvolumes, found };
}

/**
 * The moment that a snapshot's place tells in the form of Timeshift or btrbk; null for any other
 * one. Both mean the local time where no zone stands.
 */
export function foreignMoment(below: string): number | null {
  const timeshift = /^(\d{4})-(\d\d)-(\d\d)_(\d\d)-(\d\d)-(\d\d)\/@[^/]*$/.exec(below);
  const btrbk = /^[^/]+\.(\d{8})(?:T(\d{4}|\d{6}(?:([+-])(\d\d)(\d\d))?))?(?:_\d+)?$/.exec(below);
  const [, day = "", clock = "", sign, hours = "", minutes = ""] = btrbk ?? [];
  const digits = timeshift?.slice(1).join("") ?? `${day}${clock.slice(0, 6).padEnd(6, "0")}`;
  const time = parseName(`${digits.slice(0, 8)}-${digits.slice(8)}`, "");
  if (time === null || (timeshift ?? btrbk) === null) return null;
  if (sign === undefined) return momentOf(time);
  const ahead = (Number(hours) * 60 + Number(minutes)) * 60e3;
  return sign === "+" ? time - ahead : time + ahead;
}

/** How many characters of a description are kept. */
const MOST_WORDS = 60;

/** What the info.xml of snapper says of each of its numbers: when, in UTC, and its description. */
function parseInfos(text: string): Map<string, { date?: number; words?: string }> {
  const told = new Map<string, { date?: number; words?: string }>();
  const shape = /^\.\/(\d+)\/info\.xml .*?<(date|description)>(.*?)(?:<\/|$)/gm;
  for (const [, number = "", field, value = ""] of text.matchAll(shape)) {
    const date = Date.parse(`${value.replace(" ", "T")}Z`);
    const said = fromXml(value).replace(/\p{Cc}|\p{Cf}|\\/gu, " "); // as guardedRecord wants it
    const words = [...said].slice(0, MOST_WORDS).join("").trim();
    const more = field === "date" ? { date } : { words };
    const isOne = field === "date" ? !Number.isNaN(date) : words !== "";
    if (isOne) told.set(number, { ...told.get(number), ...more });
  }
  return told;
}

const XML: Readonly<Record<string, string>> = { lt: "<", gt: ">", amp: "&", quot: '"', apos: "'" };
const fromXml = (text: string) =>
  text.replace(/&(lt|gt|amp|quot|apos);/g, (_, name) => XML[name] ?? "");

// ── run: a tree of subvolumes ──

/** A run over a tree: SOURCE with its snapshot folder, and all that the members share. */
type TreeRun = Readonly<{
  o: RunOptions;
  report: Report;
  /** The snapshot folder of SOURCE, with all that is in it and below. */
  top: Source;
  /** The sources by their paths below SOURCE, which itself has the empty one. */
  sources: Map<string, Source>;
  members: ReadonlyMap<string, Subvolume>;
  /** Paths of subvolumes that went, with the first run without them; empty for this one. */
  gone: ReadonlyMap<string, string>;
  /** The members' snapshots of this run, by the same paths. */
  taken: Map<string, Snapshot>;
  /** Lets so many streams flow at a time. */
  jobs: ReturnType<typeof atMost>;
}>;

/** The folders of a destination, for each member of a tree. */
type TreePlace = {
  readonly root: Folder;
  readonly members: ReadonlyMap<string, Promise<Folder>>;
};
type TreePlaces = ReadonlyMap<string, Promise<TreePlace>>;

/** So many members are served at a time where --jobs says nothing. */
const MEMBERS_AT_A_TIME = 4;

/**
 * Backs up SOURCE and all subvolumes below it: one moment, and then each like a source of its own,
 * in folders of the same path on both sides. One place's lock and one list of subvolumes stand for
 * all members.
 */
async function backUpTree(o: RunOptions, report: Report): Promise<BackedUp | null> {
  const began = Date.now();
  for (const id of [null, ...o.destinations.map(({ location }) => location.id)])
    figuresOf(report.figures, id); // in their order
  const top = await openFinished(o);
  let tree: TreeRun | null = null;
  let places: TreePlaces = new Map();
  try {
    needRoot(top, "--recursive");
    tree = await beginTree(top, o, report);
    places = openTreePlaces(tree);
    const isPossible = await areAnyPossible(tree, places);
    const name = o.snapshot && isPossible ? await takeSnapshots(tree, places) : null;
    const told = toldOnce(tree, places, o.ifReachable && !isPossible);
    if (o.ifReachable && !isPossible) return null;
    await noteTree(tree, told, name);
    const snapshots = [...tree.sources.values()].flatMap((one) => one.snapshots);
    const words = firstWords({ o, source: { ...top, snapshots }, wanted: new Map(places) });
    await backUpMembers(tree, told);
    return name === null ? null : { name, words };
  } finally {
    for (const id of [null, ...places.keys()])
      figuresOf(report.figures, id).seconds = (Date.now() - began) / 1000;
    // SOURCE is closed last: whoever locks it finds the others free.
    const own = [...(tree?.sources.values() ?? [])].map(({ close }) => close());
    const closing = [...own, ...[...places.values()].map(closeTreePlace)];
    await whileCleaning(() => allOf(closing).finally(top.close));
  }
}

/** Opens the snapshot folders of a tree's members, and makes the missing ones. Errors: Failure. */
async function beginTree(top: Source, o: RunOptions, report: Report): Promise<TreeRun> {
  const members = membersIn(top, o);
  // As it looks where a disk is not mounted. A run that backs up nothing is no success.
  if (members.size === 0 && !isSubvolumeItself(top))
    throw new Failure(
      `${o.source.id} is a plain directory, and there is no subvolume below it to be backed up ${MOUNTED}`,
    );
  const gone = goneFrom(top, members, o.prefix);
  tellChanges(top, members, { gone, o });
  const sourceOf = (path: string) => memberSource(top, path, members.get(path) as Subvolume);
  const own = membersWithFolders(members, top.subvolumes, o);
  const opening = { ...destinationOpening(o), location: o.source, sourceOf };
  const paths = [...members.keys()].filter((path) => !own.has(path) && !/[\n\r]/.test(path));
  const folders = await openMemberFolders(top, paths, opening);
  const jobs = atMost(o.jobs);
  const open = async (path: string): Promise<Source> => {
    if (/[\n\r]/.test(path)) throw new Failure("there is a line break in its path");
    const member = memberOptions({ o, jobs, members, taken: new Map() }, path);
    if (own.has(path)) return openFinished({ ...member, snapshotFolder: o.snapshotFolder });
    const folder = await (folders.get(path) as Promise<Folder>);
    const joined =
      folder.locked || o.dryRun ? folder : await (folder.join as () => Promise<Folder>)();
    let strangers: readonly string[] = [];
    // It can have a lock of its own, which nobody else would let go of before the end.
    await closedUnless(joined, () => (strangers = strangersBeside(joined, joined.path, member)));
    return sourceIn(joined, strangers);
  };
  const width = atMost(MEMBERS_AT_A_TIME);
  const opened = await Promise.allSettled(
    [...members.keys()].map((path) => width(() => open(path))),
  );
  const sources = new Map<string, Source>();
  if (isSubvolumeItself(top)) sources.set("", { ...top, close: async () => {} });
  for (const [i, path] of [...members.keys()].entries()) {
    const one = opened[i] as PromiseSettledResult<Source>;
    if (one.status === "fulfilled") sources.set(path, one.value);
    else report.error(null, saidOf(path, one.reason));
  }
  return { o, report, top, sources, members, gone, taken: new Map(), jobs };
}

/** A member as the source of its snapshot folder. */
function memberSource(
  { source, place }: Folder,
  path: string,
  { uuid, id, path: there }: Subvolume,
) {
  const { free, size, filesystem } = place;
  const top = `/${there}`;
  const under = join(source?.path ?? "", path);
  return { path: under, inode: 256, fsid: "", filesystem, root: id, free, size, uuid, top };
}

/** Tells which members came, and which went, since the last run. */
function tellChanges(
  { chain, id, subvolumes, top }: Source,
  members: ReadonlyMap<string, Subvolume>,
  { gone, o }: { readonly gone: ReadonlyMap<string, string>; readonly o: RunOptions },
): void {
  const known = new Set(membersBelow({ subvolumes, top }, o.prefix));
  const went = [...gone].filter(([, since]) => since === "").map(([path]) => path);
  const came = [...members.keys()].filter((path) => !known.has(path));
  if (went.length > 0)
    log.info(
      `${id}: ${plural(went.length, "subvolume")} ${went.length === 1 ? "is" : "are"} not there any more: ${someOf(went, 5)}; the backups stay`,
    );
  if (came.length > 0 && chain.tree !== undefined)
    log.info(`${id}: ${plural(came.length, "subvolume")} came: ${someOf(came, 5)}`);
}

/** An error that says which member it is about. It is of the same class. */
function saidOf(path: string, error: unknown): unknown {
  const isOurs = error instanceof Failure || error instanceof Busy || error instanceof Absent;
  if (path === "" || !isOurs) return error;
  return Object.create(error, { message: { value: `${path}: ${error.message}` } }) as Error;
}

/** The options of a run for a member alone. The snapshot is taken by then. */
const memberOptions = (
  { o, jobs, taken, members }: Pick<TreeRun, "o" | "jobs" | "taken" | "members">,
  path: string,
): RunOptions => ({
  ...o,
  source: placeBelow(o.source, path),
  destinations: o.destinations.map((one) => ({
    ...one,
    location: placeBelow(one.location, path),
  })),
  snapshot: taken.has(path),
  ifReachable: false,
  member: {
    path,
    jobs,
    taken: taken.get(path) ?? null,
    below: path === "" ? [...members.keys()] : [],
  },
});

/**
 * What is told of a member, under the destinations' own names. A warning that was `told` of another
 * member in the same words is about all of them.
 */
function reportFor({ o, report }: TreeRun, path: string, told: Set<string>): Report {
  const roots = new Map(
    o.destinations.map(({ location }) => [placeBelow(location, path).id, location.id]),
  );
  const placeOf = (id: string | null) => (id === null ? null : (roots.get(id) ?? id));
  return {
    failed: false,
    tally: report.tally,
    figures: new Map(),
    event: (event, fields) => {
      const destination = fields["destination"] as string | null | undefined;
      const where = destination === undefined ? {} : { destination: placeOf(destination) };
      const whose = path === "" ? {} : { subvolume: path };
      report.event(event, { ...fields, ...where, ...whose });
    },
    warning: (message) => {
      if (told.has(message)) return;
      told.add(message);
      report.warning(path === "" || message.includes(path) ? message : `${path}: ${message}`);
    },
    error: (destination, error) => report.error(placeOf(destination), saidOf(path, error)),
  };
}

/** Adds members' figures to those of the tree. The oldest success counts, and one that never was. */
function addFigures({ report, o }: TreeRun, parts: ReadonlyMap<string, Report>): void {
  const places = [null, ...o.destinations.map(({ location }) => location)];
  for (const place of places) {
    const id = place === null ? null : place.id;
    const sum = figuresOf(report.figures, id);
    const all = [...parts].map(([path, { figures }]) =>
      figuresOf(figures, place === null ? null : placeBelow(place, path).id),
    );
    const lasts = all.map(({ last }) => last ?? "").sort();
    sum.last = lasts[0] || null;
    const least = Math.min(...all.map(({ free }) => free ?? Infinity));
    sum.free = Number.isFinite(least) ? least : null;
    for (const { deleted, kept } of all) {
      sum.deleted += deleted;
      if (kept !== null) sum.kept = (sum.kept ?? 0) + kept;
    }
  }
}

/** Opens a tree's destinations: the folders that are locked for all members. */
function openTreePlaces(tree: TreeRun): TreePlaces {
  const { o } = tree;
  const places = new Map<string, Promise<TreePlace>>();
  if (!o.transfer && o.removeLocks) return places;
  const inTurn = openingTurns(o.wait);
  const sorted = [...o.destinations].sort((a, b) => (a.location.id < b.location.id ? -1 : 1));
  for (const wanted of sorted) {
    const { location } = wanted;
    if (!isDirectory(location)) continue;
    const place = inTurn(location, () => openTreePlace(tree, { ...wanted, location }));
    place.catch(() => {}); // it is told when all had their time
    places.set(location.id, place);
  }
  return places;
}

/** Opens the folders of a destination if it is the right one. Errors: those of openBackups. */
async function openTreePlace(
  { o, top, sources, gone }: TreeRun,
  wanted: Wanted & { readonly location: Readable },
): Promise<TreePlace> {
  const { location } = wanted;
  needRoot(top, "sending");
  const known = knownDestinations(top).find((one) => one.location === location.id);
  const asked = { ...wanted, id: location.id, known };
  // A plain directory has no record of its own that knows a destination; what is below it has.
  const served = servedAt(sources, location);
  const disks = o.adopt ? [] : served.flatMap(({ filesystem }) => filesystem ?? []);
  const opening = destinationOpening(o);
  const session = { o, source: top };
  const root = await openNew(
    location,
    { source: top, isKnown: served.length > 0 },
    opening,
    (opened) => {
      if (known === undefined) checkDisk(opened, disks);
      if (holdsStreams(location)) needApart(session, location.id, opened);
      else checkBackups(session, asked, opened);
      if (sources.has("") && holdsSubvolumes(location)) strangersAmong(session, opened);
    },
  );
  // What was moved can build on what stands under the path that it had.
  const paths = [...new Set([...sources.keys(), ...gone.keys()])].filter((path) => path !== "");
  try {
    return { root, members: await openMemberFolders(root, paths, { ...opening, location }) };
  } catch (error) {
    await root.close();
    throw error;
  }
}

/** What the members of a tree know of their folders at a destination. */
const servedAt = (sources: TreeRun["sources"], location: Location): KnownDestination[] =>
  [...sources].flatMap(([path, { chain }]) => {
    const { id } = placeBelow(location, path);
    return chain.destinations?.find((known) => known.location === id) ?? [];
  });

/** Closes a destination of a tree, with the folders that have locks of their own. */
async function closeTreePlace(place: Promise<TreePlace>): Promise<void> {
  const opened = await place.catch(() => null);
  if (opened === null) return;
  await allOf([...opened.members.values()].map(closed));
  await opened.root.close();
}

/** Whether a snapshot makes sense: some destination can be one, or may yet answer. */
async function areAnyPossible(tree: TreeRun, places: TreePlaces): Promise<boolean> {
  const { o, sources } = tree;
  const isNew = ({ location }: Wanted) => servedAt(sources, location).length === 0;
  const fresh = o.destinations.filter(
    (one) => isNew(one) && isDirectory(one.location) && one.location.host === null,
  );
  if (o.ifReachable && !(await isAnyReached(tree, places))) {
    log.info(`No snapshot of ${o.source.id} is taken: no destination can be opened`);
    return false;
  }
  const looked = Promise.all(
    fresh.map(({ location, optional }) =>
      places.get(location.id)?.then(
        () => true,
        (error: unknown) => {
          if (error instanceof UsageError || error instanceof Interrupted) throw error;
          return error instanceof Busy || (error instanceof Absent && optional);
        },
      ),
    ),
  );
  const possible = (await isOverWithin(LOOK_MS, looked)) ? await looked : [true];
  const isHopeless = fresh.length > 0 && possible.every((one) => one === false);
  return fresh.length < o.destinations.length || !isHopeless;
}

/**
 * Whether any destination can be opened. A command always can. Else it is told of those that are not
 * opened for all members at once, as remotes.
 */
async function isAnyReached(tree: TreeRun, places: TreePlaces): Promise<boolean> {
  const { o } = tree;
  const away: [Wanted, unknown][] = [];
  const reached = o.destinations.map(async (wanted) => {
    const { location } = wanted;
    if (!isReadable(location)) return true;
    const place = places.get(location.id);
    const opening = place ?? openFolder(location, location.path, destinationOpening(o));
    return opening.then(
      () => true,
      (error: unknown) => {
        if (place === undefined) away.push([wanted, error]);
        return false;
      },
    );
  });
  if ((await Promise.all(reached)).includes(true)) return true;
  for (const [wanted, error] of away) tellAway(tree, wanted, error, true);
  return false;
}

/** Tells why a destination cannot be opened. One that was served before `mayBeAway`. */
function tellAway(
  { o, report, sources }: TreeRun,
  wanted: Wanted,
  error: unknown,
  mayBeAway: boolean,
): void {
  const { id } = wanted.location;
  const [known] = servedAt(sources, wanted.location);
  const isOptional = wanted.optional || (mayBeAway && known !== undefined);
  if (error instanceof Absent && isOptional) skip({ o, report }, { ...wanted, id, known }, error);
  else report.error(id, error instanceof UsageError ? new Failure(error.message) : error);
}

/** Takes all snapshots of a tree. Returns their name; null where that fails, which is reported. */
async function takeSnapshots(tree: TreeRun, places: TreePlaces): Promise<string | null> {
  const { o, report, top } = tree;
  try {
    return await betweenHooks({ o, report, source: top }, () => snapshotsOfNow(tree, places));
  } catch (error) {
    report.error(null, error);
    return null;
  }
}

/** The names that stand in the destinations of a tree that have answered by now. */
async function namesThere(places: TreePlaces): Promise<Set<string>> {
  const names = new Set<string>();
  const opened = [...places.values()].map(async (place) => {
    const { root, members } = await place;
    for (const folder of [root, ...(await Promise.all(members.values()))])
      for (const { name } of folder.standing) names.add(name);
  });
  await isOverWithin(0, Promise.allSettled(opened));
  return names;
}

/** Takes all snapshots in the first second whose name is free everywhere. Errors: Failure. */
async function snapshotsOfNow(tree: TreeRun, places: TreePlaces): Promise<string | null> {
  const { o, report, sources, taken } = tree;
  const names = await namesThere(places);
  const same = o.ifChanged && !o.dryRun ? await unchangedMembers(tree) : new Set<string>();
  const isTaken = (name: string) =>
    names.has(name) || [...sources.values()].some(({ entries }) => entries.has(name));
  for (; isTaken(snapshotName(o, new Date())); await nextSecond()) checkInterruption();
  const now = new Date();
  const name = snapshotName(o, now);
  const paths = [...sources.keys()].filter((path) => !same.has(path));
  const { made, span } = o.dryRun ? imagined(tree) : await snapshotAll(tree, paths, name);
  const moment = Math.floor(now.getTime() / 1000) * 1000;
  for (const [path, one] of made)
    if (one instanceof Failure) {
      report.error(null, saidOf(path, one));
      await sources.get(path)?.close();
      sources.delete(path);
    } else
      taken.set(path, {
        ...comingSnapshot(name, moment),
        ...one,
        readonly: true,
        name,
        path: name,
      });
  if (same.size > 0)
    log.info(
      `Nothing has changed in ${same.size} of ${plural(same.size + made.size, "subvolume")}`,
    );
  if (paths.length === 0) return null;
  if (taken.size === 0) throw new Failure(`no snapshot of ${o.source.id} could be taken`);
  const how = `${plural(taken.size, "snapshot")} ${name} of ${o.source.id} and the subvolumes below it`;
  log.info(o.dryRun ? `Would take ${how}` : `Took ${how}, within ${span} ms`);
  return name;
}

/**
 * The members that were not written to since their newest snapshot, by the generations that btrfs
 * counts them by once all that is in memory is on the disk. The others may have changed or not.
 */
async function unchangedMembers({ top, sources }: TreeRun): Promise<Set<string>> {
  const listed = await askAt(top, GENERATIONS, {}, "cannot tell what has changed");
  const generations = new Map(
    [...listed.matchAll(/^ID (\d+) gen (\d+) /gm)].map(([, id, gen]) => [Number(id), Number(gen)]),
  );
  const isSame = ({ source, identity, snapshots }: Source) => {
    const newest = snapshots.at(-1);
    const isOf =
      newest?.readonly && newest.parentUuid === identity.uuid && newest.cgen !== undefined;
    const latest = (id = 0) => generations.get(id) ?? Infinity;
    return isOf && latest(source?.root) <= newest.cgen && latest(newest.id) <= newest.cgen;
  };
  return new Set([...sources].filter(([, one]) => isSame(one)).map(([path]) => path));
}

/** What became of a member's snapshot: the new subvolume, or why there is none. */
type Made = Pick<Subvolume, "id" | "uuid" | "parentUuid" | "cgen"> | Failure;
type AllMade = { readonly made: ReadonlyMap<string, Made>; readonly span: number };

/** The snapshots of a dry run. */
const imagined = ({ sources }: TreeRun): AllMade => ({
  made: new Map(
    [...sources].map(([path, { identity }]) => [
      path,
      {
        id: Number.MAX_SAFE_INTEGER,
        uuid: crypto.randomUUID(),
        parentUuid: identity.uuid,
        cgen: Number.MAX_SAFE_INTEGER,
      },
    ]),
  ),
  span: 0,
});

/** Takes the snapshots of all members. Errors: Failure where none can be taken. */
async function snapshotAll(
  tree: TreeRun,
  paths: readonly string[],
  name: EntryName,
): Promise<AllMade> {
  const { o, top, sources } = tree;
  const made = new Map<string, Made>();
  const isTogether = (path: string) => sources.get(path)?.holder === top.holder;
  const began = Date.now();
  let span = 0;
  const batches = inArguments(
    paths.filter(isTogether).map((path) => (path === "" ? "." : `./${path}`)),
  );
  for (const some of batches) {
    const given = { ...at(top), source: top.subvolume, name, paths: some };
    const told = await ask(top.host, SNAPSHOTS, given, `cannot take snapshots of ${o.source.id}`);
    const found = parseSnapshots(told, some, { top: top.top, name });
    for (const [path, one] of found.made) made.set(path, one);
    span += found.span;
  }
  const alone = paths.filter((path) => !isTogether(path));
  for (const path of alone) made.set(path, await snapshotAlone(sources.get(path) as Source, name));
  for (const [path, one] of made)
    if (!(one instanceof Failure) && one.parentUuid !== sources.get(path)?.identity.uuid)
      made.set(path, new Failure(`${name} is not the snapshot that was taken: ${one.uuid}`));
  return { made, span: batches.length > 1 || alone.length > 0 ? Date.now() - began : span };
}

/** Takes the snapshot of a member that has a folder of its own. */
const snapshotAlone = (source: Source, name: EntryName): Promise<Made> =>
  ask(
    source.host,
    SNAPSHOT,
    { source: source.subvolume, ...at(source), name },
    `cannot take a snapshot of ${source.subvolume}`,
  ).then(
    (shown) => ({
      uuid: shownField(shown, "UUID"),
      parentUuid: shownField(shown, "Parent UUID"),
      id: Number(shownField(shown, "Subvolume ID")),
      cgen: Number.MAX_SAFE_INTEGER,
    }),
    afterFailure((failure) => failure),
  );

/** Tells once why a destination cannot be opened; the members hear that it was told. */
function toldOnce(tree: TreeRun, places: TreePlaces, mayBeAway: boolean): TreePlaces {
  const told = [...places].map(([id, place]) => {
    const heard = place.catch((error: unknown) => {
      const wanted = tree.o.destinations.find(({ location }) => location.id === id) as Wanted;
      tellAway(tree, wanted, error, mayBeAway);
      throw new AlreadyTold(messageOf(error));
    });
    heard.catch(() => {}); // whoever needs it hears of it
    return [id, heard] as const;
  });
  return new Map(told);
}

/**
 * So many bytes of a record are for what went from a tree: its line has to hold all else as well, or
 * the root could not be backed up any more. Of what has no room there, a restore takes the last backup.
 */
const GONE_BYTES = 32 * 1024;

/** Writes down on both sides that this is a tree, and which members went. Errors: none. */
async function noteTree(
  { o, report, top, sources, gone }: TreeRun,
  places: TreePlaces,
  name: string | null,
): Promise<void> {
  let room = GONE_BYTES;
  const inOrder = [...gone].sort(([, a], [, b]) => Number(a === "") - Number(b === ""));
  const since = inOrder.flatMap(([path, first]) => {
    const known = first === "" ? name : first;
    if (known === null) return [];
    room -= JSON.stringify([path, known]).length + 2;
    return room < 0 ? [] : [[path, known] as const];
  });
  const tree = { gone: Object.fromEntries(since) };
  const root = sources.get("");
  if (root !== undefined) sources.set("", { ...root, owned: { ...root.owned, tree } });
  if (o.dryRun || root !== undefined) return;
  // A plain directory has no chain of its own.
  const note = async (folder: Folder) => {
    const chain = { ...folder.chain, tree };
    if (folder.store === null && !sameRecord(folder.chain, chain)) await writeRecord(folder, chain);
  };
  const roots = [
    Promise.resolve(top),
    ...[...places.values()].map(async (one) => (await one).root),
  ];
  // Side by side: each failure is heard when it comes, and ends nothing.
  await allOf(roots.map((one) => one.then(note).catch((error) => report.error(null, error))));
}

/** Serves each member like a source of its own, some at a time. */
async function backUpMembers(tree: TreeRun, places: TreePlaces): Promise<void> {
  const { o, sources, report } = tree;
  const width = atMost(Number.isFinite(o.jobs) ? o.jobs : MEMBERS_AT_A_TIME);
  const told = new Set<string>();
  const parts = new Map([...sources.keys()].map((path) => [path, reportFor(tree, path, told)]));
  await allOf(
    [...sources].map(([path, source]) =>
      width(async () => {
        const part = parts.get(path) as Report;
        const wanted = memberOptions(tree, path);
        try {
          const session = await begunSession(source, foldersFor(o, places, path), wanted, part);
          lookElsewhere(tree, places, path, session);
          await backUpOpened(session);
        } catch (error) {
          report.error(null, saidOf(path, error));
        }
      }),
    ),
  );
  addFigures(tree, parts);
}

/**
 * What a member of a new path can build on: its snapshots under the path that it had before, where
 * it was moved.
 */
function lookElsewhere(tree: TreeRun, places: TreePlaces, path: string, session: Session): void {
  const { top } = tree;
  const { source, o } = session;
  if (source.snapshots.length > 0 || path === "") return;
  const above = top.top === "/" ? "/" : `${top.top}/`;
  const found = source.subvolumes.flatMap((one): (Snapshot & { folder: string })[] => {
    const [there, name] = [`/${one.path}`, entryName(basename(one.path))];
    const time = name === null ? null : parseName(name, o.prefix);
    const beyond = beyondFolder(source, there);
    const isOf = one.parentUuid === source.identity.uuid && one.readonly && there.startsWith(above);
    if (!isOf || name === null || time === null || beyond === null) return [];
    const folder = dirname(there).slice(above.length);
    return [{ ...one, name, beyond, time, moment: momentOf(time), folder }];
  });
  if (found.length === 0) return;
  session.beyond = found.map(({ folder: _, ...one }) => one).sort((a, b) => a.id - b.id);
  const uuids = new Set(found.map(({ uuid }) => uuid));
  const folders = new Set(found.map(({ folder }) => folder));
  const roots = new Map(
    tree.o.destinations.map(({ location }) => [placeBelow(location, path).id, location.id]),
  );
  session.elsewhere = async (id) => {
    const place = await places.get(roots.get(id) ?? "");
    const opened = await Promise.all([...folders].map((one) => place?.members.get(one)));
    const standing = opened.flatMap((folder) => folder?.standing ?? []);
    return standing.filter((one) => isComplete(one) && uuids.has(one.receivedUuid ?? ""));
  };
}

/** A member's folders at the destinations, as if they had begun to be opened for it. */
function foldersFor({ destinations }: RunOptions, places: TreePlaces, path: string) {
  const ahead = new Map<string, Ahead>();
  for (const { location } of destinations) {
    const place = places.get(location.id);
    if (place === undefined) continue;
    const folder = place.then(({ root, members }) =>
      path === "" ? { ...root, close: async () => {} } : (members.get(path) as Promise<Folder>),
    );
    folder.catch(() => {}); // whoever opens it is told
    ahead.set(placeBelow(location, path).id, { folder, go: () => {}, drop: async () => {} });
  }
  return ahead;
}

// ── run: what is known of parents ──

/** Facts about a place's snapshots, as far as they were asked for. */
type Inquiry = ReturnType<typeof inquiryInto>;

const inquiryInto = (folder: Folder) => ({
  folder,
  all: byUuid([...originalsGone(folder), ...folder.subvolumes]),
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
function learnOfParents(
  inquiry: Inquiry,
  changed: readonly Entry[],
  differences: readonly Pair[],
): Promise<void> {
  const asking = inquiry.asking.then(async () => {
    const { ctransids } = inquiry;
    for (const some of inCommands(changed.filter(({ uuid }) => !ctransids.has(uuid))))
      await learnChanges(inquiry, some);
    await learnComing(inquiry, differences);
    await learnBirths(inquiry, differences);
    await learnLosses(inquiry, differences);
  });
  inquiry.asking = asking.catch(() => {});
  return asking;
}

const pathsOf = (some: readonly Entry[]) => some.map((one) => `./${fromFolder(one)}`);

/** Snapshots in as few commands as their names fit into. */
const inCommands = (all: readonly Entry[]) =>
  batchesOf(all, (one) => argumentBytes(`./${fromFolder(one)}`), RECORD_BYTES);

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
  for (const some of inCommands(parents))
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
  for (const some of inCommands([...new Set(asked)].filter(({ uuid }) => !births.has(uuid)))) {
    const shown = await ask(
      folder.host,
      BIRTHS,
      { ...at(folder), snapshots: pathsOf(some) },
      `${folder.id}: cannot tell where snapshots come from`,
    );
    const generations = new Map<string, number>();
    for (const [, generation, name = ""] of shown.matchAll(/^ *(\d+) +\S+ \.\/(.*)$/gm))
      generations.set(name, Number(generation));
    for (const one of some) births.set(one.uuid, generations.get(fromFolder(one)) ?? null);
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
  const names = { ...at(folder), snapshot: snapshot.name, parent: fromFolder(parent) };
  const ranges = parseRewritten(await askBytes(host, REWRITTEN, names, "cannot tell what differs"));
  for (const paths of inArguments([...ranges.keys()].map((path) => `/${path}`))) {
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
  return new Map([...files].map(([path, ranges]) => [utf8Path(path), ranges]));
}

/** A path as text. Errors: Failure for what is not UTF-8, and cannot be asked for. */
function utf8Path(latin1: string): string {
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
        await beginServing(served);
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
async function beginServing(served: Served): Promise<void> {
  const { destination, wanted, standing } = served;
  const { o, report } = served.session;
  const { id } = destination;
  if (!o.transfer) return;
  const { transfers, conflicts, skipped } = await planFor(served);
  for (const conflict of conflicts) {
    report.error(id, new Failure(conflictMessage(conflict)));
    served.earlier.add(conflict.snapshot.uuid);
    served.complete = false;
  }
  // All leftovers: the next announcement replaces the one of a leftover that is not sent again.
  for (const [name, { kind }] of standing.obstacles)
    if (kind === "leftover" && !o.dryRun) await destination.discard(name);
  if (!wanted.sending.resume && !o.dryRun) await destination.tidy();
  if (skipped > 0)
    log.info(
      `${id}: ${plural(skipped, "snapshot")} older than the newest one there ${skipped === 1 ? "is" : "are"} not sent; ${wanted.minFree === null ? "--backfill sends them" : "--min-free may have deleted them"}`,
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
  const { policy, minFree, sending } = served.wanted;
  const options = {
    policy,
    incremental: o.incremental,
    newestOnly: o.newestOnly,
    now: wallClock(new Date()),
    fullEvery: sending.fullEvery,
    backfill: o.backfill,
    failed: served.earlier,
    freed: minFree !== null,
  };
  for (;;) {
    const fitness = judge(inquiry, verdicts, isThere);
    const plan =
      memory === null
        ? planTransfers([...session.beyond, ...snapshots], standing, options, fitness)
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
      await learnOfParents(inquiry, asked.filter(mayBeEdited), open).catch(
        afterFailure((failure) => forgetGone(session, open, failure)),
      );
      continue;
    }
    if (destination.compare === null || served.compared) return plan;
    const isCandidate = (one: Snapshot) => mayBeEdited(one) && !verdicts.refused.has(one.uuid);
    const edited = worthComparing(plan.transfers, snapshots, isCandidate, inquiry);
    if (edited === undefined) return plan;
    served.compared = true;
    await compareWithBackup(served, edited);
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
async function compareWithBackup(
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
  const alike = groupBy(ready, ({ todo: [next], destination }) =>
    streamKey(next as Transfer, destination, session.source),
  );
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
function atMost(most: number): <T>(work: () => Promise<T>) => Promise<T> {
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
  const takes = o.dryRun ? ((await expectedSize(session, transfer))?.bytes ?? null) : null;
  const outcomes = await refusedAhead(all, transfer, takes);
  const fitting = all.filter((served) => !outcomes.has(served));
  const receivers = fitting.map(({ destination, todo }): Receiver => ({
    ...destination,
    receive: (from, one) => destination.receive(from, one, todo.length > 1),
  }));
  const results = o.dryRun ? [] : await transferToAll(receivers, { source, transfer, display });
  for (const [i, served] of fitting.entries())
    outcomes.set(
      served,
      results[i] ?? { status: "fulfilled", value: { bytes: takes, seconds: 0 } },
    );
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

/** Tells each destination's transfer, and why those are refused that cannot be sent. */
async function refusedAhead(
  all: readonly Served[],
  transfer: Transfer,
  takes: number | null,
): Promise<Map<Served, PromiseSettledResult<Sent>>> {
  const outcomes = new Map<Served, PromiseSettledResult<Sent>>();
  for (const served of all) {
    const reason = announce(served, transfer, takes) ?? (await lackOfSpace(served, transfer));
    if (reason !== null) outcomes.set(served, { status: "rejected", reason });
  }
  return outcomes;
}

/** Tells what is sent, and how; `takes`: how much. Returns why it cannot be sent; null if it can. */
function announce(
  served: Served,
  { snapshot, parent }: Transfer,
  takes: number | null,
): Failure | null {
  const { o, snapshots } = served.session;
  const { standing, todo, destination } = served;
  const { name } = snapshot;
  const why = todo[0]?.why === undefined ? "" : `: ${todo[0].why}`;
  const isRenewal = why === "" && newestShared(snapshots, standing.held) !== null;
  const how = () => {
    if (parent !== null) return `difference to ${fromFolder(parent)}${why}`;
    if (!o.incremental) return "in full, as asked";
    if (why !== "") return `in full${why}`;
    return isRenewal ? "in full: a new chain" : "in full: no snapshot is on both sides";
  };
  const bytes = takes === null ? "" : `, some ${inBytes(takes)}`;
  // A new chain of streams is full by design.
  if (parent === null && !o.full && !isRenewal)
    return new Unwanted(
      `${name} would be sent in full${why === "" ? ": nothing of it is there" : why}; --no-full forbids it`,
    );
  log.info(
    `${o.dryRun ? "Would send" : "Sending"} ${name} to ${destination.id} (${how()}${bytes})`,
  );
  return null;
}

/**
 * What a transfer's stream will have, asked for once. Null where nobody can tell, which is no reason
 * not to send it.
 */
async function expectedSize(session: Session, transfer: Transfer): Promise<Estimate | null> {
  const { o, source } = session;
  const { uuid, name } = transfer.snapshot;
  const isComing = o.dryRun && !source.standing.some((one) => one.uuid === uuid);
  // Without root nobody can ask, and what is to be taken over is not a snapshot of SOURCE.
  if (source.alone || (isComing && o.importFrom !== null)) return null;
  try {
    return isComing ? await growthOf(source, transfer) : await estimateOf(source, transfer);
  } catch (error) {
    if (error instanceof Interrupted) throw error;
    log.debug(`${name}: nobody can tell how much it takes: ${messageOf(error)}`);
    return null;
  }
}

/**
 * Whether a destination may lack the space for a transfer. Where all of SOURCE's filesystem has room
 * there, nobody has to be asked.
 */
function mayLackSpace(served: Served, { snapshot }: Transfer): boolean {
  const { session, destination, free } = served;
  const { o, source, display } = session;
  // What is kept until it is whole is checked where it is known what is there already.
  const isKept = destination.stream === null && destination.form(source) === null;
  if (!o.spaceCheck || free === Infinity || isKept) return false;
  const used = writesLess(source) ? Infinity : source.place.size - source.place.free;
  return Math.min(used, display.sizes.get(snapshot.uuid) ?? Infinity) > free;
}

/** Why a transfer has no space at a destination; null if it has, or nobody can tell. */
async function lackOfSpace(served: Served, transfer: Transfer): Promise<Failure | null> {
  if (!mayLackSpace(served, transfer)) return null;
  const { session, destination, free } = served;
  const { o, source } = session;
  const { name } = transfer.snapshot;
  const room = Math.max(0, free); // what was sent counts in full, and can have become less on the disk
  if (transfer.parent === null && knownEstimate(transfer) === undefined)
    log.info(`${destination.id}: asking how much ${name} takes, and whether there is space for it`);
  const takes = await expectedSize(session, transfer);
  if (takes === null || takes.data <= room) return null;
  for (const settled of [false, true]) {
    served.free = await freeAgain(served, settled);
    if (takes.data <= served.free) return null;
  }
  const what = `${name} takes ${inBytes(takes.data)}, and only ${inBytes(Math.max(0, served.free))} are free there`;
  if (await maySaveSpace(destination, source, transfer, takes)) {
    session.report.warning(
      `${destination.id}: ${what}: it is tried all the same, since it can become less by compression`,
    );
    return null;
  }
  const more = o.makeRoom ? "" : ", --make-room deletes first what -n would drop after it";
  return new NoSpace(`${what}; --skip-space-check tries all the same${more}`);
}

/**
 * What is free at a destination; with `settled` once all that was deleted there is gone, which can
 * last, above all where somebody has a file of it open.
 */
async function freeAgain(
  { session, destination, free }: Served,
  settled: boolean,
): Promise<number> {
  if (destination.measure === null || session.o.dryRun) return free;
  const { bytes } = await destination.measure(settled).catch(afterFailure(() => ({ bytes: free })));
  return bytes;
}

/** Whether a stream may become less than its data where it arrives. Who cannot tell says so as well. */
const maySaveSpace = async (
  destination: Destination,
  source: Folder,
  transfer: Transfer,
  { compressing }: Estimate,
): Promise<boolean> =>
  compressing ||
  (await destination.mayShrink(source, transfer).catch(afterFailure((): boolean => true)));

/**
 * Where there was no space for a transfer, deletes what the policy would delete afterwards, and
 * sends once more. Errors: the one that was given, those of a transfer.
 */
async function withRoom(served: Served, error: unknown, now: number): Promise<Sent> {
  const { session, destination, wanted, todo, standing } = served;
  const { snapshots, o, leaps, source, display } = session;
  const going =
    error instanceof NoSpace && o.makeRoom && destination.frozen === null
      ? planRoom(snapshots, standing, todo, { policy: wanted.policy, now, adopted: leaps })
      : [];
  if (going.length === 0) throw error;
  const [transfer] = todo as [Transfer];
  await removeFrom(session, served, going, { reason: "to make room", free: true });
  if (o.dryRun) return { bytes: knownEstimate(transfer)?.bytes ?? null, seconds: 0 };
  await destination.discard(transfer.snapshot.name); // there may not have been the space to clear away
  return transferTo(destination, { source, transfer, display });
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
    parent: parent && fromFolder(parent),
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
  if (parent?.beyond !== undefined && isRefusal(error)) {
    const why = `what is in another folder cannot be built on at ${destination.id}`;
    refused.set(parent.uuid, why);
    log.info(`${why} (${(error as Failure).message}): ${snapshot.name} is sent without it`);
    served.todo = (await planFor(served)).transfers;
    return served.todo[0]?.snapshot === snapshot;
  }
  if (!(error instanceof BadParent) || parent === null) return false;
  const find = dataFinder(standing.held);
  const isSecond =
    !refused.has(parent.uuid) && [...refused.values()].some((why) => why.endsWith(DAMAGED));
  // Where a second parent is no better, the snapshot is sent in full.
  const parents = [...session.beyond, ...session.snapshots];
  const unfit = isSecond ? parents.filter((one) => find(one) !== undefined) : [parent];
  for (const { uuid, name } of unfit) refused.set(uuid, `the backup of ${name} there ${DAMAGED}`);
  const words = [parent.name, session.o.source.id, destination.id].map(shellWord).join(" ");
  session.report.warning(
    `${destination.id}: ${error.message}; the backup of ${parent.name} there ${DAMAGED}: see "btrfs-backup verify --snapshot ${words}". ${snapshot.name} is sent without it`,
  );
  served.todo = (await planFor(served)).transfers;
  return served.todo[0]?.snapshot === snapshot;
}
const DAMAGED = "seems to be damaged";

/** Whether a failure can be due to what was sent, and not to the place or the link. */
const isRefusal = (error: unknown) =>
  error instanceof Failure &&
  ![Absent, Busy, NoSpace, Stuck, Unreachable].some((other) => error instanceof other);

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
  const { session, destination, standing, failed, todo } = served;
  const { id } = destination;
  served.complete = false;
  session.report.error(id, error);
  failed.add(uuid);
  served.todo = [];
  const isPlace = error instanceof Absent || error instanceof Stuck || error instanceof Busy;
  // A command is given what is newer than the last that it took: there must be no gap.
  if (isPlace || destination.stream !== null || failed.size >= FAILURES || todo.length < 2) return;
  const isUnwanted = error instanceof Unwanted;
  if (isUnwanted && standing.held.length === 0) return; // nor are the next ones
  // What a user does not want, or a full disk, is no reason to delete a snapshot.
  const why =
    isUnwanted || error instanceof NoSpace
      ? ""
      : `; if it can never be sent, delete it: btrfs subvolume delete ${shellWord(join(session.source.path, name))}`;
  log.info(`${id}: the next ones are sent without ${name}, which the next run tries again${why}`);
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
    if (isServed) await noteUnchanged(served);
    served.done = complete;
  } catch (error) {
    report.error(destination.id, error);
  }
  served.pruning = pruneServed(served);
  served.pruning.catch(() => {}); // its error is told when all are done
}

/** Writes down what a destination shares with the source now; `isServed`: it has all it should. */
async function remember(
  { session, destination, wanted, standing, verdicts, failed, earlier }: Served,
  isServed: boolean,
  pin: Pin | null = newestShared(session.snapshots, standing.held),
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
      ...(known.get(id)?.optional || wanted.optional ? { optional: true } : {}),
    });
  await save(session);
}

/**
 * Lets the record of a destination say as well that nothing has changed since the newest backup, which
 * would seem too old to whoever looks only there.
 */
async function noteUnchanged({ session, destination, standing }: Served): Promise<void> {
  const { o, unchanged, snapshots, source } = session;
  const newest = snapshots.at(-1);
  if (o.dryRun || unchanged === undefined || unchanged === source.owned.unchanged) return;
  if (newest?.uuid !== unchanged.uuid || dataFinder(standing.held)(newest) === undefined) return;
  // Without it (an older guard refuses it), backups only seem older than they need.
  await destination.note?.(unchanged).catch((error: Error) => {
    checkInterruption();
    log.debug(error.message);
  });
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
const LOW_SPACE = 0.05;

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
    planSource(snapshots, claimants, {
      policy: o.sourcePolicy,
      now: wallClock(new Date()),
      adopted: leaps,
      full,
    });
  const decisions = decide(source.place.free < LOW_SPACE * source.place.size);
  const stays = decide(false);
  const lost = decisions
    .filter(({ reasons }, i) => reasons.length === 0 && stays[i]?.reasons.length !== 0)
    .map(({ entry }) => entry.name);
  if (lost.length > 0)
    report.warning(
      `less than ${100 * LOW_SPACE} % of the filesystem of ${id} is free: of the snapshots that are kept to be sent, the oldest go: ${lost.join(" ")}`,
    );
  warnOfLeap(decisions, id, report);
  for (const [unsent, { count: many, oldest }] of unsentIn(decisions)) {
    const last = remembered.find(({ location }) => location === unsent)?.last;
    report.warning(
      `${unsent}: ${plural(many, "snapshot")} stay${many === 1 ? "s" : ""} at the source for it, since ${oldest} (${last ? `last served ${last}` : "never served"}); ways out: send them; --drop-unsent; --optional ${shellWord(unsent)}; btrfs-backup unpin ${shellWord(id)} ${shellWord(unsent)}`,
    );
  }
  const going = tellDecisions(decisions, id, o.dryRun);
  const names = going.map(({ name }) => name);
  const reason = `not kept by "${o.sourcePolicy?.text}"`;
  await tellAndRemove(session, id, { names, reason }, async () => {
    await deleteFrom(source, going, o.deletion);
    await Promise.all(all.map(({ pruning }) => pruning)); // their errors are told first
  });
  const place = figuresOf(report.figures, null);
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

/** What is free there after all. What became less on the disk than it was on the way is measured. */
async function freeInTheEnd({ session, destination, free }: Served): Promise<number> {
  const { measure } = destination;
  if (free >= 0 || measure === null || session.o.dryRun) return Math.max(0, free);
  const { bytes } = await measure(false).catch(afterFailure(() => ({ bytes: 0 })));
  return bytes;
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
  const place = figuresOf(report.figures, destination.id);
  place.free = Number.isFinite(served.free) ? await freeInTheEnd(served) : null;
  place.seconds += (Date.now() - began) / 1000;
  if (destination.stream === null) place.kept = served.standing.backups.length;
}

/** A destination at which something is deleted. */
type Emptied = Pick<Served, "destination" | "standing"> & {
  readonly wanted: Pick<Wanted, "policy" | "minFree">;
};

/** Deletes what a destination's policy does not keep, and more if space is short there. */
async function pruneDestination(
  pruning: Pruning,
  served: Emptied,
  now = wallClock(new Date()),
): Promise<void> {
  const { destination, wanted, standing } = served;
  const { o, report, snapshots, leaps } = pruning;
  const { id, frozen } = destination;
  if (destination.stream !== null) return;
  if (frozen !== null) throw new Failure(`nothing is deleted there: ${frozen}`);
  const decisions = planDestination(snapshots, standing, {
    policy: wanted.policy,
    now,
    adopted: leaps,
  });
  warnOfLeap(decisions, id, report);
  const reason = `not kept by "${wanted.policy?.text}"`;
  await removeFrom(pruning, served, tellDecisions(decisions, id, o.dryRun), {
    reason,
    free: false,
  });
  await freeSpace(pruning, served, now);
}

/**
 * Deletes the oldest of a destination, one after the other, until --min-free has what it wants.
 * Errors: Failure where that cannot be, or seems to be in vain.
 */
async function freeSpace(pruning: Pruning, served: Emptied, now: number): Promise<void> {
  const { minFree, policy } = served.wanted;
  const { id, measure, size } = served.destination;
  if (minFree === null || measure === null) return;
  const { o, snapshots, leaps } = pruning;
  const wanted = freeOf(minFree, size);
  const what = `--min-free ${minFree.text}`;
  if (wanted > size)
    throw new Failure(`${what}: ${id} has only ${inBytes(size)}; nothing is deleted for it`);
  if (!o.dryRun && (await measure(false)).bytes >= wanted) return;
  const first = o.dryRun ? { bytes: served.destination.free, held: [] } : await measure(true);
  const found: Free[] = [first];
  const retention = { policy, now, adopted: leaps };
  const order = planFreeing(snapshots, served.standing, retention, minFree.newest);
  const free = () => inBytes(found.at(-1)?.bytes ?? 0);
  const told = () => `${free()} are free, and ${inBytes(wanted)} should be`;
  for (const [i, oldest] of order.entries()) {
    if (freeingState(found, wanted) !== "lacking") break;
    const left = order.length - i - 1;
    const more = o.dryRun ? `; the first, and up to ${left} more would follow` : "";
    await removeFrom(pruning, served, [oldest], {
      reason: `${what}: ${told()}${more}`,
      free: false,
    });
    if (o.dryRun) return; // how much that frees is not known
    found.push(await measure(true, first.held));
  }
  const state = freeingState(found, wanted);
  if (state !== "enough")
    throw new Failure(`${what}: ${told()}; ${whyNoMore(state, minFree, found.at(-1))}`);
  if (found.length > 1) log.info(`${id}: ${free()} are free now (${what})`);
}

/** Why --min-free deletes no more, although there is not as much free as it wants. */
function whyNoMore(
  state: "lacking" | "held" | "in vain",
  { newest }: MinFree,
  last: Free | undefined,
): string {
  if (state === "held") return `${stillThere(last?.held ?? [])}, so that no more is deleted`;
  if (state === "in vain")
    return "the last two deletions freed less than 1 % of what is missing, so that no more is deleted";
  return `nothing else may go: the newest ${newest} stay (--min-keep), and what words with m and y, pins or "keep" keep`;
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
  await tellAndRemove(pruning, id, { names, reason }, () => destination.remove(ordered, free));
  figuresOf(pruning.report.figures, id).deleted += names.length;
  const gone = new Set(ordered.map(({ uuid }) => uuid));
  const stays = ({ uuid }: Subvolume) => !gone.has(uuid);
  const { held, backups: ours } = served.standing;
  served.standing = {
    ...served.standing,
    held: held.filter(stays),
    backups: ours.filter(stays),
  };
}

async function tellAndRemove(
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
function tellDecisions<T extends NamedTime>(
  decisions: readonly Decision<T>[],
  id: string,
  dryRun: boolean,
): T[] {
  const tell = dryRun ? log.info : log.debug;
  for (const { entry, reasons } of dryRun || setting().level >= LEVELS.debug ? decisions : [])
    tell(`${id}: ${entry.name} ${reasons.length > 0 ? `stays: ${reasons.join(", ")}` : "goes"}`);
  return decisions.filter(({ reasons }) => reasons.length === 0).map(({ entry }) => entry);
}

/** Warns that nothing is deleted where the clock leapt. */
function warnOfLeap(decisions: readonly Decision<NamedTime>[], id: string, report: Report): void {
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
  const bytes = [...report.figures.values()].reduce((all, place) => all + place.bytes, 0);
  // Of several runs, one table tells at the end.
  const table = setting().member === null ? `\n${summaryOf(source.id, report.figures)}` : "";
  log.info(
    `${dryRun ? "Nothing was changed" : "Done"}: ${plural(snapshot, "snapshot")}, ${plural(transfer, "transfer")}${dryRun && bytes > 0 ? ` of some ${inBytes(bytes)}` : ""}, ${plural(deletions, "deletion")}${report.failed ? ", with errors" : ""}${table}`,
  );
  const known = [...report.figures].flatMap(([id, place]) =>
    place.free === null ? [] : [[id ?? source.id, place.free] as const],
  );
  const free = Object.fromEntries(known);
  report.event("summary", {
    ok: !report.failed,
    snapshot: name,
    transfers: transfer,
    ...(dryRun ? { bytes } : {}),
    deletions,
    free,
  });
}

/**
 * Replaces a file. Nobody reads half of it, and after a power cut it has one of both contents.
 * Errors: Failure.
 */
async function writeMetrics(file: string, text: string): Promise<void> {
  await ask(LOCAL, METRICS, { file }, `--metrics: cannot write ${file}`, text);
}

// ── all: every source of this machine ──

/** An argument file, which is one command line of `run`, and what is asked of it. */
export type Configured<O> = {
  readonly name: string;
  /** Errors: UsageError that says in which line of which file. */
  readonly read: () => O;
};

/** What can be done with each argument file. */
type Each = Pick<RunOptions, "json" | "wait"> & { readonly dryRun?: boolean };

/** What has become of one of several. */
type Outcome = {
  readonly name: string;
  /** Null where the file was not understood. */
  readonly source: string | null;
  /** An exit status. */
  readonly status: number;
  readonly places: Report["figures"];
  /** When it ended, in ms since 1970. */
  readonly now: number;
};

/** Of several runs, the exit status of the worst: the later one in here. */
const WORSE = [0, 3, 1, 2] as const;
const worstOf = (outcomes: readonly Pick<Outcome, "status">[]): number =>
  WORSE.findLast((one) => outcomes.some(({ status }) => status === one)) ?? 0;

/** The exit status that an error of a command means. */
const statusAfter = (error: unknown): number => {
  if (error instanceof UsageError) return 2;
  return error instanceof Busy ? 3 : 1;
};

/** The words of a table for a source of which nothing was done. */
const UNDONE: Readonly<Record<number, string>> = { 2: "refused", 3: "busy" };

/** How the argument files are gone through. */
type Together<O> = {
  readonly json: boolean;
  readonly members: readonly Configured<O>[];
  /** So many at a time. */
  readonly jobs: number;
  readonly sourceOf: (o: O) => string;
  /** Those with the same word go one after another; `all`: what all files say. */
  readonly turnOf: (o: O, all: readonly O[]) => string;
  readonly work: (o: O, report: Report, name: string) => Promise<void>;
};

/** An argument file that was understood. */
type Understood<O> = { readonly name: string; readonly own: Setting; readonly o: O };

/**
 * Does a work with each argument file. None keeps another one: what fails is told, and has its
 * exit status. Errors: Interrupted, after all of them have cleaned up.
 */
async function together<O extends Each>(how: Together<O>): Promise<Outcome[]> {
  const all = how.members.map((member) => understood(member, how));
  const slots = atMost(how.jobs);
  const turns = new Map<string, Promise<unknown>>();
  const options = all.flatMap((one) => ("o" in one ? [one.o] : []));
  const firsts = all.map((one) => {
    if ("status" in one) return Promise.resolve(one);
    const turn = how.turnOf(one.o, options);
    const first = (turns.get(turn) ?? Promise.resolve()).then(() =>
      slots(() => doneWith(one, how, all.length > 1)),
    );
    turns.set(turn, endOf(first, null));
    return first;
  });
  try {
    const ended = await Promise.allSettled(firsts);
    const outcomes: Outcome[] = [];
    for (const [i, one] of all.entries()) {
      const first = resultOf(ended[i]);
      // Two of ours may have met in one folder under two names: then each has its turn now.
      if (first === null && "own" in one)
        outcomes.push((await doneWith(one, how, false)) as Outcome);
      else outcomes.push(first as Outcome);
    }
    return outcomes;
  } finally {
    await whileCleaning(disconnect);
  }
}

/** Reads an argument file; one that makes no sense is told, and is done with. */
function understood<O extends Each>(
  { name, read }: Configured<O>,
  { json, sourceOf }: Together<O>,
): Understood<O> | Outcome {
  const member = { name, source: null as string | null };
  const own = newSetting(member);
  return settings.run(own, () => {
    try {
      const o = read();
      member.source = sourceOf(o);
      return { name, own, o };
    } catch (error) {
      const report = newReport(json, false);
      tellOf(report, error);
      const status = statusAfter(error);
      return { name, source: null, status, places: report.figures, now: Date.now() };
    }
  });
}

/** Tells an error that is the end for one of several. */
const tellOf = (report: Report, error: unknown): void =>
  report.error(null, error instanceof UsageError ? new Failure(error.message) : error);

/** Does a work with an argument file; null where another run is at work, if it `isPatient`. */
const doneWith = <O extends Each>(
  { name, own, o }: Understood<O>,
  { work, sourceOf }: Together<O>,
  isPatient: boolean,
): Promise<Outcome | null> =>
  settings.run(own, async () => {
    const report = newReport(o.json, o.dryRun ?? false);
    let status = 0;
    try {
      await work(o, report, name);
      status = report.failed ? 1 : 0;
    } catch (error) {
      if (error instanceof Interrupted) throw error;
      if (error instanceof Busy && isPatient && o.wait === 0) return null;
      tellOf(report, error);
      report.event("summary", { ok: false });
      status = statusAfter(error);
    }
    return { name, source: sourceOf(o), status, places: report.figures, now: Date.now() };
  });

/** What stands on top of each argument file. */
export type AllOptions = Pick<RunOptions, "json" | "dryRun" | "jobs" | "metrics"> & {
  readonly members: readonly Configured<RunOptions>[];
};

/** Runs each argument file, several at a time, and returns the worst exit status. */
export async function runAll(o: AllOptions, report: Report): Promise<number> {
  const outcomes = await together({
    json: o.json,
    members: o.members,
    jobs: o.jobs,
    sourceOf: ({ source }) => source.id,
    turnOf(one, all) {
      const { source, snapshotFolder, prefix } = treeAround(one, all) ?? one;
      return JSON.stringify([source.host, resolve(source.path, snapshotFolder), prefix]);
    },
    work: run,
  });
  const failed = outcomes.filter(({ status }) => status !== 0);
  const errors = failed.length === 0 ? "" : `, ${failed.length} of them with errors`;
  log.info(
    `${o.dryRun ? "Nothing was changed" : "Done"}: ${plural(outcomes.length, "source")}${errors}\n${tableOf(outcomes)}`,
  );
  const status = worstOf(outcomes);
  return settings.run(newSetting(ALL), async () => {
    const sources = outcomes.map((one) => ({
      args: one.name,
      source: one.source,
      status: one.status,
    }));
    report.event("all", { ok: status === 0, status, sources });
    if (o.metrics !== null && !o.dryRun)
      await writeMetrics(o.metrics, metricsOfOutcomes(outcomes)).catch((error) =>
        report.error(null, error),
      );
    return worstOf([...outcomes, { status: report.failed ? 1 : 0 }]);
  });
}

/**
 * The outermost tree that a source can be a member of. The folder of a member is locked by the
 * tree's run as well, and that would find it busy.
 */
const treeAround = (
  { source, prefix }: RunOptions,
  all: readonly RunOptions[],
): RunOptions | undefined =>
  all
    .filter(
      (one) =>
        one.recursive &&
        one.prefix === prefix &&
        JSON.stringify(one.source.host) === JSON.stringify(source.host) &&
        isWithin(source.path, one.source.path),
    )
    .sort((one, other) => one.source.path.length - other.source.path.length)[0];

/** What is told of all of them. */
const ALL = { name: null, source: null };

/** One table of what was done at the places of several sources. */
function tableOf(outcomes: readonly Outcome[]): string {
  const all = outcomes.flatMap(({ name, source, status, places }) => {
    const rows = summaryRows(source ?? "", places);
    if (!places.has(null)) rows.unshift([source ?? "", ...SUMMED.map(() => "")]);
    const [first = [], ...others] = rows;
    const undone = UNDONE[status];
    const head = undone === undefined ? first : [...first.slice(0, -1), undone];
    return [[name, ...head], ...others.map((row) => ["", ...row])];
  });
  return alignedTable([["", "", ...SUMMED], ...all]).trimEnd();
}

function metricsOfOutcomes(outcomes: readonly Outcome[]): string {
  const measured = outcomes.flatMap(({ source, places, now }): Measured[] =>
    source === null ? [] : [{ source, places, now }],
  );
  const broken = outcomes.length - measured.length;
  const name = "btrfs_backup_broken_files";
  return `${metricsOfAll(measured)}# HELP ${name} Argument files that make no sense.\n# TYPE ${name} gauge\n${name} ${broken}\n`;
}

/** The argument files of a command that only looks, one after another. */
export type LookingAtAll<O> = Pick<Together<O>, "json" | "members">;

/** Shows what each SOURCE and its destinations have. */
export async function listAll({
  json,
  members,
  aged,
}: LookingAtAll<ListOptions> & { readonly aged: boolean }): Promise<number> {
  const outcomes = await together({
    json,
    members,
    jobs: 1,
    sourceOf: ({ locations }) => locations[0]?.id ?? "",
    turnOf: () => "",
    work(o, report, name) {
      if (!o.json && o.maxAge === null) print(`${name}:\n`);
      return list(o, report);
    },
  });
  for (const { name, source, status, places } of outcomes)
    if (aged && !json && status !== 0 && places.has(null))
      print(`UNKNOWN: ${source ?? `${name}.args`}: ${places.get(null)?.why}\n`);
  return worstOf(outcomes);
}

/** Looks whether the next run of each argument file would do its work. */
export const checkAll = async ({ json, members }: LookingAtAll<RunOptions>): Promise<number> =>
  worstOf(
    await together({
      json,
      members,
      jobs: 1,
      sourceOf: ({ source }) => source.id,
      turnOf: () => "",
      work(o, report, name) {
        if (!o.json && setting().level >= LEVELS.info) print(`${name}:\n`);
        return checkRun(o, report);
      },
    }),
  );

// ── what several of these commands do ──

/** How places are looked at, of any prefix if that is null. */
type LookOptions = Pick<RunOptions, "hosts" | "snapshotFolder"> & {
  readonly prefix: string | null;
};

/** Opens a place without locking it. Errors: those of `openFolder`. */
const lookAt = (location: Readable, path: string, prefix: string, hosts: Hosts) =>
  openFolder(location, path, { prefix, wait: "look", hosts });

/** How a command opens the places that it works in: a dry run locks nothing. */
const openingOf = (
  { dryRun, wait, hosts }: Pick<RunOptions, "dryRun" | "wait" | "hosts">,
  prefix: string,
): Opening => ({ prefix, wait: dryRun ? "look" : wait, hosts });

const tellFailure = (report: Report, id: string | null, message: string) =>
  report.error(id, new Failure(message));

// ── trees: a source and the subvolumes below it ──

/** How the members of a tree are opened: never locked, since their locks are the root's. */
type MemberOpening = Pick<Opening, "hosts" | "unverified">;

/**
 * Opens the folders of members, by their paths, for the prefix that the root is open for.
 * Errors: those of `openFolder`.
 */
async function openMembers(
  root: Folder,
  location: Readable,
  paths: readonly string[],
  opening: MemberOpening,
): Promise<Map<string, Folder>> {
  const own = ownFoldersIn(root, root.prefix);
  const few = atMost(4);
  const how = { ...opening, prefix: root.prefix, wait: "look" as const };
  const standard = paths.filter((path) => !own.has(path));
  const joint = isDirectory(location)
    ? await openMemberFolders(root, standard, { ...how, location })
    : new Map<string, Promise<Folder>>();
  const opened = paths.map((path) => {
    const member = placeBelow(location, path);
    const inside = own.get(path);
    const folder = inside === undefined ? member.path : join((root.source as Place).path, inside);
    return few(
      async () => [path, await (joint.get(path) ?? openFolder(member, folder, how))] as const,
    );
  });
  return new Map(await allOf(opened));
}

/** Streams in full below a store: the paths of their folders, and their names. Errors: of `ask`. */
async function storedBelow(root: Folder, location: Readable): Promise<StoredBelow[]> {
  const cannot = `${root.id}: cannot look for streams below it`;
  const listed = isDirectory(location)
    ? await ask(root.host, BELOW, at(root), cannot)
    : await ask(root.host, REMOTE_BELOW, { folder: root.path }, cannot);
  const found = listed.split("\n").map((line) => line.replace(/^\.\//, ""));
  return found.flatMap((file) => {
    const path = dirname(file);
    const [stream] = parseStreams([{ name: basename(file), bytes: 0 }], true).streams;
    return stream === undefined || path === "." || !isMemberPath(path)
      ? []
      : [{ path, name: stream.name }];
  });
}
type StoredBelow = { readonly path: string; readonly name: EntryName };

/** The prefixes of the trees that a place is the root of: as it records, or else by the names below. */
async function treePrefixes(root: Folder, location: Readable): Promise<string[]> {
  const recorded = [...root.record.chains].flatMap(([of, { tree }]) => (tree ? [of] : []));
  if (recorded.length > 0) return recorded.sort();
  if (root.store !== null) return prefixesIn(await storedBelow(root, location));
  const folders = new Set(membersBelow(root, null).map((path) => join(root.top, path)));
  const below = root.subvolumes.filter(({ path }) => folders.has(dirname(`/${path}`)));
  return prefixesIn(below.map(({ path }) => ({ name: basename(path) as EntryName })));
}

/** A place of a whole tree. `members`: all but the root, by their paths. */
type Tree = { readonly root: Folder; readonly members: ReadonlyMap<string, Folder> };

/** Opens the members of a tree whose root is open. Errors: those of `openFolder`, Failure. */
async function openTree(root: Folder, location: Readable, opening: MemberOpening): Promise<Tree> {
  if (root.store !== null) {
    const stored = await storedBelow(root, location);
    const ours = stored.filter(({ name }) => parseName(name, root.prefix) !== null);
    const paths = [...new Set(ours.map(({ path }) => path))].sort();
    return { root, members: await openMembers(root, location, paths, opening) };
  }
  needRoot(root, "looking for subvolumes below");
  const own = ownFoldersIn(root, root.prefix);
  const paths = membersBelow(root, root.prefix).filter((path) => !own.has(path));
  const found = await openMembers(root, location, paths, opening);
  const { members, foreign } = membersOf(root.chain.owner, found);
  const first = foreign[0];
  if (first !== undefined)
    log.info(
      `${root.id}: ${plural(foreign.length, "folder")} below it ${foreign.length === 1 ? "is" : "are"} another source's, and no part of the tree: ${someOf(foreign, 5)}`,
    );
  const inside = await openMembers(root, location, [...own.keys()], opening);
  return { root, members: new Map([...members, ...inside]) };
}

/**
 * Opens the root of a tree. Without a prefix, where nothing stands in the root itself (its source
 * was a plain directory), it is the one that the names below have. Errors: those of `openLocation`.
 */
async function openTreeRoot(
  location: Readable,
  o: Parameters<typeof openLocation>[1],
): Promise<Folder> {
  const root = await openLocation(location, o);
  if (o.prefix !== null || prefixesIn(root.standing).length > 0) return root;
  const prefixes = await treePrefixes(root, location).catch(async (error: Error) => {
    await root.close();
    throw error;
  });
  const [only = root.prefix, ...others] = prefixes;
  if (others.length > 0)
    return closedUnless(root, () => {
      throw new UsageError(
        `${location.id} holds several prefixes, choose one with -p: ${[only, ...others].map((one) => JSON.stringify(one)).join(", ")}`,
      );
    });
  if (only === root.prefix) return root;
  await root.close();
  return openLocation(location, { ...o, prefix: only });
}

// ── copy: backups, sent on ──

/** Sends backups on, prefix by prefix, as `run` sends a source's snapshots. */
export async function copy(o: ReturnType<typeof copyOptions>, report: Report): Promise<void> {
  const { first, prefixes, needBackups } = await lookAtBackups(
    o.source,
    o,
    `"btrfs-backup run --no-snapshot" sends these`,
  );
  if (prefixes.length === 0)
    throw new Failure(`there are no backups in ${o.source.id}${hintFor(first)}${hintBelow(first)}`);
  const options = { ...o, snapshotFolder: "." };
  checkPlaces(options);
  for (const prefix of prefixes)
    try {
      needBackups(prefix);
      await persistently({ ...options, prefix }, report, copyPrefix);
    } catch (error) {
      if (prefixes.length === 1 || error instanceof UsageError) throw error;
      report.error(o.source.id, error); // the other prefixes can still be copied
    }
  if (prefixes.length > 1) for (const place of report.figures.values()) place.kept = null; // it is that of the last one
  concludeRun(o, report, null);
}

async function copyPrefix(o: RunOptions, report: Report): Promise<void> {
  const open = async () => {
    const folder = await openFolder(o.source, o.source.path, openingOf(o, o.prefix));
    const { chain, path, place, top, hostName } = folder;
    // Whose the backups are goes with them, so that their source can go on in the copy.
    const uuid = `${place.filesystem}${top}`;
    const identity = chain.owner ?? { uuid, host: hostName, path };
    return { ...folder, snapshots: wholeIn(folder), identity, subvolume: path, owned: chain };
  };
  await backUp(open, o, report);
}

/**
 * Looks at a place of backups. `advice`: what to do with a source's snapshots.
 * Errors: UsageError where all are a source's; of `needBackups`: Failure where a prefix has such.
 */
async function lookAtBackups(location: Readable, o: LookOptions, advice: string) {
  const first = await openLocation(location, { ...o, prefix: o.prefix ?? "", wait: "look" });
  const prefixes = o.prefix === null ? prefixesIn(first.standing) : [o.prefix];
  const isSource = (prefix: string) => isSnapshotFolder(withPrefix(first, prefix));
  const why = `has snapshots of a source: ${advice}`;
  if ([first.prefix, ...prefixes].every(isSource)) throw new UsageError(`${location.id} ${why}`);
  const needBackups = (prefix: string) => {
    if (isSource(prefix)) throw new Failure(`the prefix ${JSON.stringify(prefix)} ${why}`);
  };
  return { first, prefixes, needBackups };
}

// ── prune: a policy for a place of backups ──

export type PruneOptions = ReturnType<typeof pruneOptions>;

/** Deletes from a place of backups what a policy does not keep, without its source. */
export async function prune(o: PruneOptions, report: Report): Promise<void> {
  for (const location of await placesToPrune(o, report))
    try {
      await pruneLocation({ ...o, location }, report);
    } catch (error) {
      if (!o.recursive) throw error;
      report.error(location.id, error); // the other subvolumes can still be pruned
    }
  const { delete: deletions = 0 } = report.tally;
  log.info(
    `${o.dryRun ? "Nothing was changed" : "Done"}: ${plural(deletions, "deletion")}${report.failed ? ", with errors" : ""}`,
  );
  report.event("summary", { ok: !report.failed, deletions });
}

/** The location, and with --recursive those of the subvolumes below it. Each is locked by itself. */
async function placesToPrune(o: PruneOptions, report: Report): Promise<Readable[]> {
  if (!o.recursive) return [o.location];
  const root = await openTreeRoot(o.location, { ...o, wait: "look" });
  const { members } = await openTree(root, o.location, o);
  const below = [...members.keys()].map((path) => placeBelow(o.location, path));
  if (below.length === 0)
    report.warning(`${o.location.id}: there are no subvolumes of a tree below it`);
  const isPlain = below.length > 0 && prefixesIn(root.standing).length === 0;
  return isPlain ? below : [o.location, ...below];
}

async function pruneLocation(o: PruneOptions, report: Report): Promise<void> {
  const { first, prefixes, needBackups } = await lookAtBackups(
    o.location,
    o,
    `"btrfs-backup run --no-snapshot --no-transfer -N …" prunes these`,
  );
  // One look serves all prefixes. Only one of which something is to be done is opened, and locked.
  const all = prefixes.flatMap((prefix) => withPrefix(first, prefix).snapshots);
  if (all.length === 0) tellNothing(first, o, report);
  const arriving = arrivals(first, all);
  arriving.catch(() => {});
  const now = wallClock(new Date());
  for (const prefix of prefixes) {
    const looked = withPrefix(first, prefix);
    let folder = looked;
    try {
      needBackups(prefix);
      // Something may have gone in this moment: then each is asked for by itself.
      const moments = await arriving.catch(() => null);
      let pruning = moments && pruningOf(looked, o, moments, now);
      if (pruning === null || !(o.dryRun || pruning.isIdle)) {
        folder = await openFolder(o.location, o.location.path, openingOf(o, prefix));
        pruning = pruningOf(folder, o, await arrivals(folder, folder.snapshots), now);
        if (pruning.isNews && !o.dryRun) await writeRecord(folder, pruning.chain);
      }
      const { leaps } = pruning;
      const wanted = { policy: o.policy, minFree: o.minFree };
      await pruneDestination({ o, report, snapshots: [], leaps }, { ...pruning, wanted }, now);
    } catch (error) {
      report.error(o.location.id, error); // the other prefixes can still be pruned
    } finally {
      if (folder !== looked) await whileCleaning(folder.close);
    }
  }
}

/** Tells where backups are, if they are not where they were looked for. */
function tellNothing(folder: Folder, { prefix }: PruneOptions, report: Report): void {
  const { id } = folder;
  const below = hintBelow(folder);
  if (below !== "")
    report.warning(`${id}: there are no backups in it${below}; --recursive prunes those of a tree`);
  else log.info(`${id}: there are no backups in it${hintFor(withPrefix(folder, prefix ?? ""))}`);
}

/** What there is to prune of one prefix. `moments`: by UUID, when they arrived. */
function pruningOf(
  folder: Folder,
  o: PruneOptions,
  moments: ReadonlyMap<string, number>,
  now: number,
) {
  const destination = destinationToPrune(folder, o);
  const { backups } = destination.standing;
  const newest = backups.some(({ belated }) => belated) ? { newest: backups.at(-1)?.uuid } : {};
  const ordered = asReceived(folder, backups, moments);
  const standing = { ...destination.standing, backups: ordered, ...newest };
  const known = folder.chain.leaps;
  const leaps = o.adoptClock ? leapNames([ordered], known) : known;
  const chain = { ...folder.chain, ...(leaps === undefined ? {} : { leaps }) };
  const isNews =
    folder.store === null && folder.record.unreadable === null && !sameRecord(chain, folder.chain);
  const goes = () =>
    planDestination([], standing, { policy: o.policy, now, adopted: leaps }).some(
      ({ reasons }) => reasons.length === 0,
    );
  const isShort = o.minFree !== null && destination.free < freeOf(o.minFree, destination.size);
  const isIdle = !isNews && destination.frozen === null && !isShort && !goes();
  return { destination, standing, leaps: leaps ?? [], chain, isNews, isIdle };
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

/**
 * A place of backups as a destination without a source. In a store, it is about all that the newest
 * stream's source calls its own.
 */
function destinationToPrune(folder: Folder, o: PruneOptions): Destination {
  const { store, prefix, id, chain } = folder;
  needRoot(folder, "pruning");
  const reopen = () => lookAt(o.location, folder.path, prefix, o.hosts);
  if (store === null)
    return folderDestination(folder, {
      again: reopen,
      owned: chain,
      announced: [],
      elsewhere: [],
      ...o.deletion,
      btrfsDebug: false,
      sending: NO_SENDING,
    });
  const ours = store.streams.filter(({ name }) => parseName(name, prefix) !== null);
  const owner = ours.at(-1)?.owner ?? ownerOf({ uuid: "", host: "", path: "" });
  return storeDestination(folder, {
    store,
    again: reopen,
    standing: standingInStore(store, prefix, lineagesOf(ours, owner, [])),
    owner,
    lock: lockFile(`${id}\n${prefix}`),
    sending: NO_SENDING,
  });
}

/**
 * When backups arrived, by UUID, as far as their place tells: who may only add backups can give
 * them any name, but not any time. Three processes at most, whatever their number, but for what
 * neither btrfs-progs nor the kernel tells in a list. Errors: Failure.
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
  const moments = new Map<string, number>();
  const lacking = () => entries.filter(({ uuid }) => !moments.has(uuid));
  // sudo does not pass the time zone on.
  const listed =
    alone || host.sudo ? "" : (await ask(host, MADE, place, cannot)).replace(/\n$/, "");
  for (const [, date, time, uuid = ""] of listedLines(listed, LISTED_MADE))
    if (date !== undefined) moments.set(uuid, Date.parse(`${date}T${time}Z`));
  const byName = (some: readonly Entry[]) =>
    new Map(some.map(({ name, uuid }) => [`./${name}`, uuid]));
  const full = byName(lacking().filter(({ parentUuid }) => parentUuid === null));
  for (const names of inArguments([...full.keys()])) {
    const born = await ask(host, BORN, { ...place, names }, cannot);
    for (const [, seconds, name = ""] of born.matchAll(/^([1-9]\d*) (.*)$/gm))
      moments.set(full.get(name) ?? "", Number(seconds) * 1000);
  }
  const others = byName(lacking());
  const created = /^(\.\/.*)\n\s+Creation time:\s+(\S+) (\S+) ([+-]\d{4})$/gm;
  for (const names of inArguments([...others.keys()])) {
    const shown = await ask(host, RECEIVED, { ...place, names }, cannot);
    for (const [, name = "", date, time, zone] of shown.matchAll(created))
      moments.set(others.get(name) ?? "", Date.parse(`${date}T${time}${zone}`));
  }
  return moments;
}

/** Backups in the order of their arrival, dated by it. Errors: Failure where it is not known. */
function asReceived(
  { id, store }: Folder,
  backups: readonly Backup[],
  moments: ReadonlyMap<string, number>,
): Backup[] {
  let last = -Infinity;
  const inOrder = [...backups].sort((a, b) => a.id - b.id);
  return inOrder.map((backup) => {
    const moment = moments.get(backup.uuid);
    if (moment === undefined) {
      if (store?.verbs.isDirectory === false) return backup;
      throw new Failure(`${id}: it is not known when ${backup.name} was received`);
    }
    // The order of arrival is that of IDs, whatever the clock did.
    last = store === null ? Math.max(last, moment) : moment;
    return { ...backup, time: wallClock(new Date(moment)), moment: last };
  });
}

// ── restore: a subvolume again from a backup ──

export type RestoreOptions = ReturnType<typeof restoreOptions> & {
  /** TARGET is a mount point, and its subvolume is reached by another way. */
  readonly through?: Through;
};

/** Makes TARGET a writable subvolume with a backup's contents, from which its next runs go on. */
export async function restore(o: RestoreOptions, report: Report): Promise<void> {
  const advice = (mount: Mount) => mountAdvice(o.words, mount.path, mount);
  const entered = o.replace ? await enterTop(o.target, o.hosts, advice) : null;
  if (entered === null) return restoreRepeatedly(o, report);
  try {
    await restoreRepeatedly(await optionsThrough(o, entered), report);
  } catch (error) {
    if (error instanceof Error) error.message = explained(entered.through, error.message);
    throw error;
  } finally {
    await whileCleaning(entered.release);
  }
}

async function restoreRepeatedly(o: RestoreOptions, report: Report): Promise<void> {
  for (;;)
    try {
      return await restoreOnce(o, report);
    } catch (error) {
      if (!(error instanceof SameSecond)) throw error;
      await nextSecond();
    }
}

async function restoreOnce(o: RestoreOptions, report: Report): Promise<void> {
  if (o.inner !== null) return restorePath(o, o.inner, report);
  if (o.recursive) return restoreTree(o, report);
  const display = displayOf(o);
  if (!o.dryRun) await finishRestores(o.target, o.target.path, o.hosts);
  const location = await openLocation(o.location, { ...o, wait: o.dryRun ? "look" : o.wait });
  const opened = [location];
  try {
    const chosen = chooseSnapshot(location, o);
    const target = await openTarget(o, location.prefix);
    const outside = target.inside === null ? await openOutside(target, location, o) : null;
    if (outside !== null && outside !== location) opened.push(outside);
    const parents = await openParents(target, o);
    if (location.store === null) compressionBetween(location, target, o.sending.level);
    const opening = { ...NO_TREE, o, report, display, location, chosen, target, outside, parents };
    const plan = await decideRestore(opening);
    warnAhead(plan);
    for (const prefix of o.dryRun ? [] : prefixesIn(plan.moved))
      if (prefix !== location.prefix)
        opened.push(await openFolder(o.location, location.path, openingOf(o, prefix)));
    const sums = await readyPieces(plan, plan.data.way === "streams" ? plan.data.pieces : []);
    await clearLeftovers(plan, null);
    tellPlan(plan);
    if (!o.dryRun) await carryOut(plan, sums);
    report.event("restore", {
      location: location.id,
      name: chosen.name,
      target: o.target.id,
      ...namesIn(plan),
    });
    tellWhatIsNext(plan);
    if (location.chain.tree !== undefined)
      log.info(
        `${location.id} is the root of a tree: the subvolumes below it come back with --recursive`,
      );
    tellRemount(plan);
  } finally {
    await whileCleaning(async () => {
      for (const folder of opened) await folder.close();
    });
  }
  report.event("summary", { ok: !report.failed });
}

/** A restore that was asked for, with its places opened. */
type Restore = {
  readonly o: RestoreOptions;
  readonly report: Report;
  readonly display: Display;
  readonly location: Folder;
  readonly chosen: Snapshot;
  readonly target: Target;
  /** TARGET's snapshot folder where it is outside of TARGET; it may be LOCATION itself. */
  readonly outside: Folder | null;
  /** The folder of --parent-from. */
  readonly parents: Folder | null;
  /** In a restore of a tree, the subvolume's path below TARGET; empty for TARGET itself. */
  readonly member: string;
  /** What the record of a tree's root says of it. */
  readonly tree: ChainRecord["tree"] | null;
};
const NO_TREE = { member: "", tree: null } as const;

/** How the data get to TARGET. `parent`: a snapshot that is on both sides. */
type Way =
  /** `origin`, the path of a subvolume on TARGET's filesystem, has them. */
  | { readonly way: "reflink"; readonly origin: string }
  /** LOCATION sends a stream. */
  | ({ readonly way: "receive" } & Pick<Transfer, "parent" | "why">)
  /** Stored streams are received, one on top of the other. */
  | {
      readonly way: "streams";
      readonly store: Store;
      readonly pieces: readonly Stream[];
      readonly parent: Snapshot | null;
    };

/** What moves to TARGET: some of a source's own snapshots, where it is restored from these. */
type Moves = {
  readonly moved: readonly Entry[];
  /** LOCATION is inside of the subvolume that TARGET replaces. */
  readonly replaced: boolean;
  /** LOCATION's path when TARGET has its name. */
  readonly from: string;
  /** By prefix, the source's records; none where LOCATION has no source's own snapshots. */
  readonly chains: ReadonlyMap<string, ChainRecord>;
};

/** A restore of which all is decided. */
type Restoration = Restore &
  Moves & {
    readonly data: Way;
    /** How the snapshot gets into TARGET's snapshot folder: see BUILD. */
    readonly how: "none" | "plain" | "keep";
    /** The name of the directory beside TARGET where TARGET is built. */
    readonly work: string;
    /** Where the subvolume goes that TARGET replaces. */
    readonly kept: string | null;
  };

/** The snapshot that is asked for. Errors: Failure telling what there is. */
function chooseSnapshot(
  location: Folder,
  { snapshot, before: until }: Pick<RestoreOptions, "snapshot" | "before">,
): Snapshot {
  const { id, store, prefix } = location;
  const whole = wholeIn(location);
  const stored = store?.streams.filter((one) => one.stored);
  // A stored stream that lacks what it builds on is not passed over in silence.
  const all = stored === undefined ? whole : snapshotsAmong(stored, prefix, null);
  const alike = stored?.filter((one) => one.readonly && one.name === snapshot) ?? [];
  if (new Set(alike.map(({ receivedUuid }) => receivedUuid)).size > 1)
    throw new Failure(
      `${id} has several snapshots ${snapshot}; --snapshot takes these names as well: ${alike.map(({ uuid }) => uuid).join(" ")}`,
    );
  const found =
    snapshot === null
      ? all.findLast(({ time }) => time <= (until ?? Infinity))
      : snapshotNamed(snapshot, all, location);
  if (found === undefined) {
    const lacking = snapshot === null ? "nothing to restore" : `no complete snapshot ${snapshot}`;
    const what = until === null ? lacking : "nothing from that time or before";
    const range =
      whole.length === 0
        ? "nothing complete"
        : `${plural(whole.length, "snapshot")} from ${whole[0]?.name} to ${whole.at(-1)?.name}`;
    throw new Failure(`${id}: ${what}; it has ${range}${hintFor(location)}${hintBelow(location)}`);
  }
  if (stored !== undefined && !found.readonly)
    throw new Failure(
      `${id}: ${found.name} cannot be restored: ${missingFor(found, location)}; ${adviceInstead(location, whole)}`,
    );
  return found;
}

/** A snapshot by its name, or a stored stream by its own; also one without a time in its name. */
function snapshotNamed(
  wanted: string,
  all: readonly Snapshot[],
  location: Folder,
): Snapshot | undefined {
  const isWhole = isSnapshotFolder(location) ? (one: Entry) => one.readonly : isComplete;
  const named = location.standing.find((entry) => entry.name === wanted && isWhole(entry));
  return (
    all.findLast(
      ({ name, path }) => name === wanted || (location.store !== null && path === wanted),
    ) ??
    (named && { ...named, time: 0, moment: 0 })
  );
}

/** Why a location may have less than its user expects. */
function hintFor(folder: Folder): string {
  const { store, entries, host, id, place, standing, prefix, snapshots } = folder;
  const others = snapshots.length > 0 ? [] : prefixesIn(standing).filter((one) => one !== prefix);
  if (others.length > 0)
    return ` (there are some with ${others.length === 1 ? "another prefix" : "other prefixes"}: ${others.map((one) => `-p ${shellWord(one)}`).join(", ")})`;
  if (store !== null) {
    const unsummed = store.streams.filter(({ stored }) => !stored).length;
    return unsummed === 0
      ? ""
      : ` (${plural(unsummed, "stream")} without a checksum object: --unverified restores what there is)`;
  }
  const files = [...entries].map((name) => ({ name, bytes: 0 }));
  if (parseStreams(files, true).streams.length > 0)
    return ` (there are stored streams in it: raw${host.ssh === null ? "://" : "+"}${id})`;
  return place.filesystem === null ? " (it is not on btrfs)" : "";
}

/** What a stored stream lacks. */
function missingFor({ uuid }: Subvolume, { store }: Folder): string {
  const streams = store?.streams ?? [];
  let lacking = streams.find((one) => one.uuid === uuid) as Stream;
  const seen = new Set([lacking.uuid]);
  const parent = () =>
    streams.find((one) => one.stored && one.receivedUuid === lacking.from && !seen.has(one.uuid));
  for (let above; (above = parent()) !== undefined; seen.add(above.uuid)) lacking = above;
  const half = streams.find((one) => !one.stored && one.receivedUuid === lacking.from);
  return half !== undefined
    ? `${half.uuid} has no checksum object`
    : `the stream that ${lacking.uuid} builds on, ${lacking.from}, is missing`;
}

/** What to restore where something else cannot be. */
const adviceInstead = ({ id }: Folder, whole: readonly Snapshot[]) =>
  whole.length === 0
    ? `nothing else in ${id} can be restored`
    : `the newest that can be restored without it: --snapshot ${shellWord(whole.at(-1)?.name as string)}`;

/** Where a subvolume is restored to: the folder that it will stand in. */
type Target = Folder & {
  /** TARGET's name and path. */
  readonly name: string;
  readonly full: string;
  /** The path that it has for everybody, and for records. */
  readonly known: string;
  /** The subvolume that has the name now. */
  readonly existing: Subvolume | null;
  /** The path of TARGET's snapshot folder below TARGET; null where it is elsewhere. */
  readonly inside: string | null;
};

/** What to do where TARGET is a mount point that is not replaced from the top level. */
const mountProblem = ({ words, target: { id } }: RestoreOptions, full: string, mount: Mount) =>
  mount.root === "/"
    ? mountAdvice(words, full, mount)
    : `${id} is a mount point, of the subvolume ${mount.root.slice(1)} of ${mount.device}; --replace gives its name to the restored subvolume, and keeps the old one beside it`;

/** Looks at TARGET. Errors: Failure saying why it cannot be one, and what to do instead. */
async function openTarget(o: RestoreOptions, prefix: string): Promise<Target> {
  const { id, path } = o.target;
  const parent = await lookAt(o.target, dirname(path), prefix, o.hosts);
  const name = basename(path);
  const full = join(parent.path, name);
  const mount = parent.mounts.findLast((one) => one.path === full);
  if (mount !== undefined) throw new Failure(mountProblem(o, full, mount));
  if (!parent.exists) throw new Failure(`no such directory: ${parent.path}`);
  if (parent.place.filesystem === null) throw new Failure(`${parent.path} is not on btrfs`);
  needRoot(parent, "restoring");
  // Only btrfs runs under sudo: files of others are in the way.
  const alone = parent.host.sudo && parent.user !== "0";
  needRoot({ ...parent, alone }, "restoring: --sudo is not enough;");
  const isTarget = (subvolume: Subvolume) => `/${subvolume.path}` === join(parent.top, name);
  const existing = parent.subvolumes.find(isTarget) ?? null;
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
  const folder = snapshotFolderIn(o);
  if (folder === path) throw new UsageError("the snapshot folder cannot be TARGET itself");
  const inside = isWithin(folder, path) ? folder.slice(path.length + 1) : null;
  return { ...parent, name, full, known: knownPath(o, full), existing, inside };
}

const samePlace = (a: Folder, b: Folder) =>
  a.hostName === b.hostName && a.place.filesystem === b.place.filesystem && a.top === b.top;

/** TARGET's snapshot folder where it is outside of TARGET, locked: it may be LOCATION itself. */
async function openOutside(target: Target, location: Folder, o: RestoreOptions): Promise<Folder> {
  const opening = openingOf({ ...o, dryRun: true }, location.prefix);
  const check = (folder: Folder) => {
    if (folder.place.filesystem !== target.place.filesystem)
      throw new UsageError(
        `the snapshot folder ${folder.path} is not on the filesystem of ${o.target.id}`,
      );
    const known = dataFinder(wholeIn(location));
    const claimed = judgeClaim({
      identity: { uuid: "", host: target.hostName, path: target.known },
      chain: folder.chain,
      standing: folder.snapshots,
      shared: folder.snapshots.filter((s) => known(s)),
      adopt: false,
      isMember: false,
    });
    if (!claimed.accepted) throw new Failure(`${folder.path}: ${refusalMessage(claimed)}`);
  };
  // Another host's word does not count.
  const isLocation = (folder: Folder) =>
    sameHost(folder.host, location.host) && samePlace(folder, location);
  const path = snapshotFolderIn(o);
  const seen = await openChecked(o.target, path, opening, (folder) => {
    if (!isLocation(folder)) check(folder);
  });
  if (isLocation(seen)) return location;
  return o.dryRun ? seen : openChecked(o.target, path, { ...opening, wait: o.wait }, check);
}

/** Looks at the folder of --parent-from. Errors: UsageError where it is on another filesystem. */
async function openParents(target: Target, o: RestoreOptions): Promise<Folder | null> {
  const { parentFrom: id } = o;
  if (id === null) return null;
  const path = o.target.host === null ? resolve(id) : id;
  const folder = await lookAt({ ...o.target, id }, path, target.prefix, o.hosts);
  if (folder.place.filesystem !== target.place.filesystem)
    throw new UsageError(`--parent-from ${id} is not on the filesystem of ${o.target.id}`);
  return folder;
}

/** The mount that TARGET is seen through, and the path below it of one from the top level. */
function throughMount(target: Pick<Folder, "mounts" | "path">): {
  mount: Mount;
  through: (top: string) => string;
} {
  const { mount } = placeOn(target.mounts, target.path);
  const length = mount.root === "/" ? 0 : mount.root.length;
  return { mount, through: (top) => join(mount.path, top.slice(length)) };
}

/** The path of a folder on the filesystem of TARGET, for verbs that work beside TARGET. */
const besideTarget = ({ o, target }: Pick<Restore, "o" | "target">, folder: Folder) =>
  o.through === undefined ? folder.path : throughMount(target).through(folder.top);

/**
 * Whether a location is on the filesystem of TARGET, here. Another host could say that it is this
 * one, and would choose what is moved here.
 */
const isHere = (location: Folder, target: Folder) =>
  sameHost(location.host, target.host) &&
  location.hostName === target.hostName &&
  location.place.filesystem === target.place.filesystem;

/**
 * Decides what is there already, what is sent, and what moves.
 * Errors: Failure or UsageError for what cannot be done, before anything is changed.
 */
async function decideRestore(r: Restore): Promise<Restoration> {
  const { location, chosen, target } = r;
  const ground = await groundOf(r);
  const standing = standingOutside(r);
  const moves = decideMoves(r);
  const data = await decideWay(r, ground, standing);
  const comes = standing !== null || moves.moved.some(({ uuid }) => uuid === chosen.uuid);
  const made = isHere(location, target) ? "plain" : "keep";
  const now = stamp(new Date());
  return {
    ...r,
    ...moves,
    data,
    how: comes ? "none" : made,
    work: `${target.name}.restoring-${now}`,
    kept: target.existing && join(target.path, `${target.name}.before-${now}`),
  };
}

/**
 * What a receive could build on where it is restored. `edited`: the UUIDs of the subvolumes that
 * it cannot build on, since they may have been changed.
 */
type Ground = { readonly there: readonly Subvolume[]; readonly edited: ReadonlySet<string> };

async function groundOf(r: Restore): Promise<Ground> {
  const { o, location, target, outside, parents } = r;
  const { mount } = throughMount(target);
  const folder = outside?.top ?? join(target.top, target.name, target.inside ?? "");
  const folders = parents !== null ? [parents.top] : [target.top, folder];
  const there = target.subvolumes.filter(
    ({ path, readonly }) =>
      readonly && folders.includes(dirname(`/${path}`)) && isWithin(`/${path}`, mount.root),
  );
  const edited = isHere(location, target) ? new Set<string>() : await editedAmong(there, r);
  if (edited.size > 0)
    log.info(
      `${o.target.id}: ${plural(edited.size, "snapshot")} there may have been edited, and nothing is built on ${edited.size === 1 ? "it" : "them"}; "btrfs-backup verify" tells, and clears`,
    );
  return { there: there.filter(({ uuid }) => !edited.has(uuid)), edited };
}

/** The UUIDs of subvolumes that hold data of LOCATION's, and may have been edited since. */
async function editedAmong(
  there: readonly Subvolume[],
  { o, location, target }: Restore,
): Promise<Set<string>> {
  const edited = new Set<string>();
  const held = dataFinder(location.standing);
  const doubtful = there.filter(
    (one) =>
      held(one) !== undefined && changedSince(one, { ctransids: new Map() }, {}) === undefined,
  );
  for (const [directory, some] of groupBy(doubtful, ({ path }) => dirname(`/${path}`))) {
    const path = throughMount(target).through(directory);
    const folder = await lookAt(o.target, path, location.prefix, o.hosts);
    const inquiry = inquiryInto(folder);
    await learnOfParents(
      inquiry,
      some.map((one) => ({ ...one, name: basename(one.path) as EntryName, moment: null })),
      [],
    );
    const known = folder.chain.destinations?.find((one) => one.location === location.id);
    for (const one of some)
      if (changedSince(one, inquiry, known?.cleared ?? {})) edited.add(one.uuid);
  }
  return edited;
}

/** The chosen snapshot where it stands outside. Errors: Failure where other data has its name. */
function standingOutside({ chosen, outside }: Restore): Entry | null {
  const found = outside?.standing.find(({ name, readonly }) => name === chosen.name && readonly);
  if (found && (found.uuid === chosen.uuid || dataFinder([found])(chosen))) return found;
  if (outside?.entries.has(chosen.name))
    throw new Failure(`${outside.path} has something else by the name of ${chosen.name}`);
  return null;
}

/** Decides what moves to TARGET. Errors: Failure or UsageError where it cannot. */
function decideMoves(r: Restore): Moves {
  const { o, location, target, outside } = r;
  const here = isHere(location, target);
  const own = here && isSnapshotFolder(location);
  const old = target.existing && `/${target.existing.path}`;
  const replaced = old !== null && isWithin(location.top, old);
  if (here && !own && replaced)
    throw new UsageError(
      `${location.id} is inside of ${o.target.id}, which would be moved away with the backups`,
    );
  const from = replaced
    ? join(target.full, location.top.slice(old.length))
    : throughMount(target).through(location.top);
  if (!own) return { moved: [], replaced, from, chains: new Map() };
  const chains = new Map(location.record.chains).set(location.prefix, {
    ...location.chain,
    destinations: knownDestinations(location),
  });
  const moved = outside === location ? [] : movedOf(r, replaced, chains);
  const moves = { moved, replaced, from, chains };
  if (moved.length > 0) checkMoves(r, moves);
  return moves;
}

/** All snapshots of a LOCATION that is replaced; else the pins, and with them the chosen one. */
function movedOf(
  { location, chosen }: Restore,
  replaced: boolean,
  chains: Moves["chains"],
): readonly Entry[] {
  const all = location.standing.filter(({ name, readonly }) => readonly && prefixOf(name) !== null);
  if (replaced) return all;
  const known = [...chains.values()].flatMap(({ destinations = [] }) => destinations);
  const pins = new Set(known.map(({ pin }) => pin?.uuid));
  return all.filter(({ uuid }) => pins.has(uuid) || (pins.size > 0 && uuid === chosen.uuid));
}

/** Errors: Failure where snapshots cannot move to TARGET. */
function checkMoves(r: Restore, { replaced, from }: Moves): void {
  const { o, location, target, outside } = r;
  const { mount } = throughMount(target);
  const isSeen =
    replaced ||
    (isWithin(location.top, mount.root) && placeOn(target.mounts, from).top === location.top);
  if (
    !isSeen ||
    (outside !== null && placeOn(target.mounts, besideTarget(r, outside)).mount !== mount)
  )
    throw new Failure(
      `the snapshots of ${location.id} can only move to ${o.target.id} below one mount point: mount the top level (subvolid=5), and restore there`,
    );
  if (replaced && target.existing?.readonly)
    throw new Failure(
      `${o.target.id} is read-only, so its snapshots cannot move: btrfs property set -ts ${quote(target.full)} ro false`,
    );
}

/** Decides how the data come, and asks about each parent in question before. */
async function decideWay(r: Restore, ground: Ground, standing: Entry | null): Promise<Way> {
  const { location, chosen } = r;
  const inquiry = inquiryInto(location);
  const fitness =
    location.store !== null ? ANY : judge(inquiry, { cleared: {}, refused: new Map() }, () => true);
  for (;;) {
    const data = wayFrom(r, ground, standing, fitness);
    if (data.way !== "receive" || data.parent === null) return data;
    const { parent } = data;
    if (fitness.unfit(parent, chosen) !== undefined) return data;
    await learnOfParents(inquiry, changedSince(parent, inquiry, {}) === undefined ? [parent] : [], [
      { parent, snapshot: chosen },
    ]);
  }
}

/** How the data come, by what is known of the parents. */
function wayFrom(
  r: Restore,
  { there, edited }: Ground,
  standing: Entry | null,
  fitness: Fitness,
): Way {
  const { location, chosen, target, outside } = r;
  const { store } = location;
  const reflink = (origin: string): Way => ({ way: "reflink", origin });
  if (standing !== null && !edited.has(standing.uuid))
    return reflink(join(besideTarget(r, outside as Folder), chosen.name));
  if (isHere(location, target)) return reflink(join(besideTarget(r, location), chosen.name));
  const { present, parent, why } = planRestore(chosen, wholeIn(location), there, fitness);
  if (present !== null) return reflink(throughMount(target).through(`/${present.path}`));
  if (store === null) return { way: "receive", parent, why };
  return { way: "streams", store, pieces: planPieces(piecesOf(chosen, store), there), parent };
}

/** All streams that a stored snapshot consists of, the full one first. */
const piecesOf = (stored: Entry, { streams }: Store) => chainOf(stored as Stream, byUuid(streams));

const bytesOf = (streams: readonly Pick<Stream, "bytes">[]) =>
  streams.reduce((sum, { bytes }) => sum + bytes, 0);

/** Warns of what the user may not expect of a restore. */
function warnAhead(r: Restoration): void {
  const { o, report, location, chosen, target, parents, data, how } = r;
  const left = [...leftoversOf(target.name, target).keys()].map(
    (name) => `${join(target.top, name)}/`,
  );
  const twins = target.subvolumes.filter(
    ({ path, readonly, receivedUuid }) =>
      readonly &&
      receivedUuid === dataOf(chosen) &&
      !left.some((leftover) => `/${path}`.startsWith(leftover)),
  );
  if (how === "keep" && twins.length > 0)
    report.warning(
      `${o.target.id}: ${chosen.name} stands twice on its filesystem then, which can confuse "btrfs receive"; keep one of it and ${twins.map(({ path }) => path).join(", ")}`,
    );
  if (parents !== null && data.way !== "reflink" && data.parent === null)
    report.warning(`--parent-from ${o.parentFrom}: nothing there is shared with ${location.id}`);
}

/**
 * Makes sure that every piece can be read before the first byte moves, and returns their checksums.
 * Errors: Failure naming what is missing.
 */
async function readyPieces(
  { o, location, target }: Pick<Arrival, "o" | "location" | "target">,
  pieces: readonly Stream[],
): Promise<Map<string, string>> {
  if (location.store === null) return new Map();
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
  return readSums(location, location.store, pieces);
}

/** The checksum objects of streams. */
async function readSums(
  location: Folder,
  { verbs }: Store,
  streams: readonly Stream[],
): Promise<Map<string, string>> {
  const texts: string[] = [];
  for (const objects of inArguments(streams.map(({ uuid }) => uuid + SUM)))
    texts.push(
      await ask(
        location.host,
        verbs.fetch,
        { ...at(location), how: "", holder: "", objects },
        `${location.id}: cannot read checksum objects`,
      ),
    );
  return parseSums(texts.join(""));
}

/**
 * Removes what interrupted restores to TARGET left; `only`: of those one directory. Returns whether
 * all of it was such. Errors: Busy while such a restore is still at work.
 */
async function clearLeftovers(
  { o, target }: Pick<Workplace, "o" | "target">,
  only: string | null,
): Promise<boolean> {
  let isAll = true;
  const now = only === null ? target : await lookAt(o.target, target.path, target.prefix, o.hosts);
  for (const [name, paths] of leftoversOf(target.name, now)) {
    if (only !== null && name !== only) continue;
    const full = join(target.path, name);
    if (only === null)
      log.info(
        explained(
          o.through,
          `${o.dryRun ? "Would remove" : "Removing"} what an interrupted restore left: ${full}`,
        ),
      );
    const idOf = new Map(now.subvolumes.map(({ path, id }) => [`/${path}`, id]));
    const ids = paths.flatMap((path) => idOf.get(join(now.top, name, path)) ?? []).join(" ");
    if (o.dryRun) continue;
    const stays = await ask(
      target.host,
      CLEAR,
      { ...at(target), work: name, ids, paths },
      `cannot remove ${full}, which an interrupted restore left`,
    );
    if (stays === "") continue;
    isAll = false;
    log.warn(stays);
  }
  return isAll;
}

function tellPlan({ o, location, chosen, data, moved }: Restoration): void {
  log.info(
    `${o.dryRun ? "Would restore" : "Restoring"} ${chosen.name} from ${location.id} to ${o.target.id} (${wayInWords(data)})`,
  );
  if (moved.length > 0)
    log.info(
      `${o.dryRun ? "Would move" : "Moving"} ${plural(moved.length, "snapshot")} from ${location.path}, so that every destination goes on from ${o.target.id}`,
    );
}

function wayInWords(data: Way): string {
  if (data.way === "reflink") return "reflinked, nothing is sent";
  if (data.way === "streams")
    return `${plural(data.pieces.length, "stream")}, ${inBytes(bytesOf(data.pieces))}`;
  const { parent, why } = data;
  return `${parent === null ? "in full" : `difference to ${parent.name}`}${why === undefined ? "" : `: ${why}`}`;
}

/** Builds TARGET in a directory beside it, and gives it its name. Errors: SameSecond, Failure. */
async function carryOut(r: Restoration, sums: Arriving["sums"]): Promise<void> {
  await inWork(r, async (folder, release) => {
    await build({ ...r, folder, sums });
    checkInterruption();
    await giveNames(r, release);
    if (r.moved.some(({ receivedUuid }) => receivedUuid !== null))
      await writeRestoredRecords(r, r.target.full, null);
  });
}

/** Where a restore works: the directory `work` of a folder; `name` is what such ones begin with. */
type Workplace = {
  readonly o: Pick<RestoreOptions, "target" | "hosts" | "dryRun" | "through">;
  readonly target: Folder & Pick<Target, "name">;
  readonly work: string;
};

/** Makes the directory beside TARGET, and removes it when the work fails. Errors: SameSecond. */
async function inWork<T>(
  r: Workplace,
  work: (folder: Folder, release: () => Promise<void>) => Promise<T>,
): Promise<T> {
  const { o, target, work: name } = r;
  needOurs(target, o.target.id);
  const { output, release } = await holdVerb(
    target.host,
    RESTORING,
    { ...at(target), work: name, end: `${name} end`, silence: secondsOfSilence(target.host) },
    { end: `${name} end`, what: o.target.id },
  ).catch((error: Error) => {
    throw error instanceof Taken ? new SameSecond(error.message) : error;
  });
  try {
    const holder = output.split("\n")[0] as string;
    const host = behindFence(plainHost(target.host), { ...target, holder });
    return await work({ ...target, path: join(target.path, name), holder, host }, release);
  } catch (error) {
    await release();
    await whileCleaning(() => clearLeftovers(r, name)).catch((problem: Error) =>
      log.warn(`${problem.message} (the next restore to ${o.target.id} will)`),
    );
    throw error;
  }
}

/** Gets the data, and makes of them WORK/tree, or a subvolume in it, and the records. */
async function build(r: Arriving): Promise<void> {
  const { o, location, chosen, target, outside, data, how, work, member } = r;
  if (data.way === "receive") await receiveSnapshot(r, data);
  if (data.way === "streams") await receiveStreams(r, data);
  const built = {
    ...at(target),
    work,
    origin: data.way === "reflink" ? data.origin : "",
    name: chosen.name,
    how,
  };
  const folder = outside === null ? (target.inside ?? "") : besideTarget(r, outside);
  const cannot = `cannot build ${o.target.id}`;
  if (member === "") await ask(target.host, BUILD, { ...built, target: folder }, cannot);
  else await ask(target.host, NEST, { ...built, ...nestOf(r, folder) }, cannot);
  // A source's own snapshots, and backups on this filesystem, are no destination to remember.
  const came = isHere(location, target) || isSnapshotFolder(location) ? null : location;
  await writeRestoredRecords(r, join(target.path, work, "tree"), came);
}

/** Streams of LOCATION that arrive in `folder`. `sums`: their SHA-256, by object. */
type Arrival = {
  readonly o: Pick<RestoreOptions, "target" | "sending" | "btrfsDebug" | "unverified">;
  readonly report: Report;
  readonly display: Display;
  readonly location: Folder;
  readonly target: Folder;
  readonly folder: Folder;
  readonly sums: ReadonlyMap<string, string>;
};

/** A restore whose streams arrive. */
type Arriving = Restoration & Arrival & Pick<Restoration, "o" | "target">;

async function discardReceived(
  { target, folder }: Pick<Arrival, "target" | "folder">,
  name: string,
  how: "" | "whole" = "",
): Promise<void> {
  await ask(
    target.host,
    DISCARD,
    { ...at(folder), prefix: folder.prefix, name, ...NO_RECORD, how },
    `cannot remove what was received of ${name}`,
  );
}

/** Warns of a damaged parent, on which nothing is built then. Errors: any other error. */
function warnOfParent({ o, report, chosen }: Restore, error: unknown): void {
  if (!(error instanceof BadParent)) throw error;
  report.warning(
    `${o.target.id}: ${error.message}; what it was to build on there ${DAMAGED} (see "btrfs-backup verify"): ${chosen.name} is received in full`,
  );
}

/** Receives the snapshot from LOCATION; in full where its parent is damaged. */
async function receiveSnapshot(r: Arriving, data: Way & { way: "receive" }): Promise<void> {
  await receiveOn(r, r.chosen, data.parent).catch(async (error) => {
    if (data.parent === null) throw error;
    warnOfParent(r, error);
    await receiveOn(r, r.chosen, null);
  });
}

/** Receives a snapshot from LOCATION. Errors: as `pipeline`. */
async function receiveOn(r: Arrival, chosen: Snapshot, parent: Snapshot | null): Promise<Sent> {
  const { o, report, display, location, target, folder } = r;
  const form = formBetween(location, target, o.sending);
  const { btrfsDebug } = o;
  const end = (level: string) =>
    receiveStage(folder, chosen.name, { level, chain: null, btrfsDebug });
  const receiver = {
    id: o.target.id,
    form: () => form,
    receive: async (source: Folder, transfer: Transfer) => ({
      stages: mustBeChecked(source, folder, o.sending)
        ? checkedReceive(folder, form.level, expected(source, transfer), end)
        : [end(form.level)],
    }),
    discard: (name: string) => discardReceived(r, name),
    tidy: async () => {},
  };
  const transfer = { snapshot: chosen, parent };
  const sent = await transferTo(receiver, { source: location, transfer, display });
  report.event("transfer", {
    destination: o.target.id,
    name: chosen.name,
    parent: parent?.name ?? null,
    ...sent,
  });
  return sent;
}

/** Receives stored streams; all of the snapshot's where the first one's parent is damaged. */
async function receiveStreams(r: Arriving, data: Way & { way: "streams" }): Promise<void> {
  const { store, pieces } = data;
  await receivePieces(r, store, pieces).catch(async (error) => {
    warnOfParent(r, error);
    await discardReceived(r, pieces[0]?.name as string);
    const all = piecesOf(r.chosen, store);
    await receivePieces({ ...r, sums: await readyPieces(r, all) }, store, all);
  });
}

/** How many subvolumes that others were received on top of stand in the way at most. */
const MOST_BELOW = 16;

/**
 * Receives stored streams, one on top of the other. Each is removed when the next stands on it.
 * Errors: Failure naming a piece that is damaged, and what can be restored without it.
 */
async function receivePieces(r: Arriving, store: Store, pieces: readonly Stream[]): Promise<void> {
  const { folder } = r;
  const below: Stream[] = [];
  for (const [i, piece] of pieces.entries()) {
    const label = `${i + 1}/${pieces.length} ${piece.name}`;
    await receivePiece(r, store, piece, { label, isFirst: i === 0 });
    // What the next one stands on goes, a few at a time, unless that is much.
    if (i > 0) below.push(pieces[i - 1] as Stream);
    const isMuch = below.length >= MOST_BELOW || bytesOf(below) >= SMALL_STREAMS.all;
    if (piece !== pieces.at(-1) && !isMuch) continue;
    const going = below.splice(0).map((one) => ({ name: one.name, id: null }));
    await deleteFrom(folder, going, { convertRw: false, sync: false });
  }
}

/**
 * Receives one stored stream. `isFirst`: what it stands on was there before. Errors: BadParent for
 * such a one; Failure naming a piece that is damaged, and what can be restored without it.
 */
async function receivePiece(
  r: Arrival,
  store: Store,
  piece: Stream,
  { label, isFirst }: { readonly label: string; readonly isFirst: boolean },
): Promise<void> {
  const { o, report, location, sums } = r;
  const { uuid: object, name } = piece;
  const began = Date.now();
  const { summed } = await pipeline(stagesOf(r, store, piece, label)).catch((error: Error) => {
    if (error instanceof BadParent && isFirst && piece.parentUuid !== null) throw error;
    if (error instanceof Failure && !(error instanceof NoSpace))
      throw new Failure(
        `${location.id}: ${object}: ${error.message}. If it is damaged: ${insteadOf(location, store, piece)}`,
      );
    throw error;
  });
  const { sum, bytes } = summed as Summed;
  const right = sums.get(object);
  if (!o.unverified && sum !== right)
    throw new Failure(
      `${location.id}: ${object} is damaged: it has the SHA-256 ${sum}, and should have ${right ?? "one"}; ${insteadOf(location, store, piece)}`,
    );
  report.event("transfer", {
    destination: o.target.id,
    name,
    parent: store.streams.find(({ uuid }) => uuid === piece.parentUuid)?.name ?? null,
    bytes,
    seconds: (Date.now() - began) / 1000,
  });
}

function stagesOf(r: Arrival, { verbs }: Store, piece: Stream, label: string): Stage[] {
  const { o, location, folder, display } = r;
  const { uuid: object, name, bytes, compressed, encrypted } = piece;
  const fetch = fetching(location, verbs, object);
  const decrypt = encrypted ? [{ label: "gpg", command: `${GPG} --decrypt` }] : [];
  const { btrfsDebug } = o;
  const end = (packed: string) =>
    receiveStage(folder, name, { level: packed, chain: null, btrfsDebug });
  const level = compressed ? "1" : "";
  const received = o.sending.trust
    ? [end(level)]
    : checkedReceive(folder, level, expectedOf(piece), end);
  if (o.sending.trust) log.info(`${object} is received as it is, by --trust-stream`);
  log.debug(`Receiving ${object}`);
  return [
    fetch,
    ...meter(label, display, o.sending.rate, { size: () => bytes }),
    relayStage({ sum: true }),
    ...decrypt,
    ...received,
  ];
}

const fetching = (folder: Folder, verbs: StoreVerbs, object: string) =>
  verbStage(
    "reading",
    folder.host,
    verbs.fetch,
    { ...at(folder), how: "", holder: holderOf(folder), objects: [object] },
    { sends: true },
  );

const insteadOf = (location: Folder, store: Store, damaged: Stream) =>
  adviceInstead(
    location,
    wholeIn(location).filter(
      (one) => !piecesOf(one, store).some(({ uuid }) => uuid === damaged.uuid),
    ),
  );

/**
 * Writes the records of a restored subvolume's snapshot folder: what is there says how it was when
 * the snapshot was taken. `backups`: where the snapshot came from.
 */
async function writeRestoredRecords(
  r: Restoration,
  tree: string,
  backups: Folder | null,
): Promise<void> {
  const { o, target, outside, chains } = r;
  const path = outside === null ? join(tree, target.inside ?? "") : besideTarget(r, outside);
  const folder = await openFolder(o.target, path, {
    prefix: target.prefix,
    wait: "look",
    hosts: o.hosts,
    source: join(tree, r.member),
  });
  const recorded = chains.size > 0 ? chains : folder.record.chains;
  for (const prefix of new Set([...recorded.keys(), folder.prefix])) {
    const restored = { ...folder, prefix };
    // What is still to be moved there is not gone.
    const standing = [...folder.standing, ...r.moved];
    await writeRecord({ ...restored, standing }, recordAfter(r, restored, backups));
  }
}

/** What the record of a restored snapshot folder must say of its prefix. */
function recordAfter(r: Restoration, folder: Folder, backups: Folder | null): ChainRecord {
  const { target, chains, chosen } = r;
  const { prefix, standing, record } = folder;
  const own = chains.size > 0;
  const { owner: _, ...chain } = { ...record.chains.get(prefix), ...chains.get(prefix) };
  const snapshot = standing.find(({ name }) => name === chosen.name);
  const came =
    backups !== null && snapshot !== undefined && prefix === target.prefix
      ? {
          id: backups.id,
          filesystem: backups.place.filesystem,
          pin: { name: snapshot.name, uuid: snapshot.uuid },
        }
      : null;
  const known = (chain.destinations ?? []).map((one) => (own ? withPinIn(one, standing) : one));
  const destinations = restoredDestinations(
    known,
    (uuid) => own || standing.some((one) => one.uuid === uuid),
    came,
  );
  // A backup brings along a record, which others can have written on another host, or in a store.
  const doubted =
    !own &&
    (backups === null || backups.host.ssh !== null || backups.store !== null || !backups.trusted);
  return {
    ...chain,
    ...(isOwnFolder(r) ? {} : { owner: ownerOutside(r, folder) }),
    ...(r.tree !== null && prefix === target.prefix ? { tree: r.tree } : {}),
    destinations,
    ...(doubted && known.length > 0 ? { guarded: true as const } : {}),
  };
}

/** A destination whose pin may have been replaced by its copy, which has another UUID. */
function withPinIn(known: KnownDestination, standing: readonly Entry[]): KnownDestination {
  const { pin } = known;
  if (pin === null) return known;
  const found = standing.find(({ name }) => name === pin.name);
  return { ...known, pin: { ...pin, uuid: found?.uuid ?? pin.uuid } };
}

/** Whether a restored subvolume's snapshots stand inside of it, where nobody asks whose they are. */
const isOwnFolder = ({ outside, member, target }: Restore) =>
  outside === null && (member === "" || isWithin(target.inside ?? "", member));

/** Whose a chain outside of its subvolume is: that one's, unless its owner stands elsewhere. */
function ownerOutside({ target, member }: Restore, folder: Folder): SourceIdentity {
  const { prefix, source, record } = folder;
  const path = join(target.known, member);
  const owner = record.chains.get(prefix)?.owner;
  const isElsewhere =
    owner !== undefined &&
    owner.path !== path &&
    target.subvolumes.some(({ uuid }) => uuid === owner.uuid);
  return isElsewhere ? owner : { uuid: source?.uuid ?? "", host: target.hostName, path };
}

/** The path of TARGET's snapshot folder when TARGET has its name. */
const snapshotFolderOf = (r: Restore) =>
  r.outside === null ? join(r.target.full, r.target.inside ?? "") : besideTarget(r, r.outside);

/** Gives names to what was built: there is no way back from here, only one forward. */
async function giveNames(r: Restoration, release: () => Promise<void>): Promise<void> {
  const { o, report, location, target, work, kept, moved, replaced, from } = r;
  const to = snapshotFolderOf(r);
  const names = moved.map(
    ({ name, receivedUuid }) => `${receivedUuid === null ? "move" : "copy"}\n${name}`,
  );
  const lines = [from, to, kept === null ? "new" : "old", ...names, "end", ""].join("\n");
  const finished = await whileCleaning(() =>
    ask(
      target.host,
      FINISH,
      { ...at(target), work, how: "begin", mark: o.through === undefined ? "" : "yes" },
      `cannot finish ${o.target.id}`,
      lines,
    ),
  ).catch(async (error: Error) => {
    throw new Failure(await howFar(r, error.message));
  });
  await release();
  const { stuck } = parseFinished(finished);
  if (stuck.length > 0)
    tellFailure(
      report,
      o.target.id,
      explained(
        o.through,
        `it is restored, but these snapshots could not move from ${replaced ? kept : location.path}: ${stuck.join(" ")}`,
      ),
    );
}

/**
 * What FINISH printed: where the snapshots are to be, and what could not move there.
 * Errors: Failure for any other shape.
 */
function parseFinished(text: string): { to: string; stuck: readonly string[] } {
  const [to = "", stuck = "", end, ...rest] = text.split("\n");
  if (end !== "end" || rest.join() !== "")
    throw new Failure(`cannot read what was printed of a restore's end: ${text}`);
  return { to, stuck: stuck.split("//").filter(Boolean) };
}

/** What to say where a restore broke when names had begun to change. */
async function howFar(r: Restoration, problem: string): Promise<string> {
  const { o, location, target, work, kept } = r;
  const now = await lookAt(o.target, target.path, target.prefix, o.hosts);
  const stands = (name: string) =>
    now.subvolumes.some(({ path }) => `/${path}` === join(now.top, name));
  if (stands(`${work}/tree`) || !stands(target.name))
    return `${problem} (${now.entries.has(work) ? "the next run or restore goes on with it" : "nothing was changed"})`;
  return `it is restored, but not all of its snapshots have moved from ${kept ?? location.path}; the next run or restore moves them: ${problem}`;
}

/**
 * Goes on with restores to a path that were interrupted when names had begun to change.
 * Errors: Failure, Busy.
 */
async function finishRestores(location: Readable, path: string, hosts: Hosts): Promise<void> {
  const folder = await lookAt(location, dirname(path), "", hosts);
  for (const work of leftoversOf(basename(path), folder).keys()) {
    const finished = await whileCleaning(() =>
      ask(
        folder.host,
        FINISH,
        { ...at(folder), work, how: "" },
        `cannot finish what an interrupted restore of ${location.namespace === undefined ? path : location.id} began`,
      ),
    );
    if (finished === "") continue;
    const { to, stuck } = parseFinished(finished);
    const known = location.namespace === undefined ? path : location.id;
    log.info(`Finished the restore of ${known} that was interrupted`);
    if (stuck.length > 0)
      throw new Failure(
        `${known} is restored, but these snapshots could not move to ${to}: ${stuck.join(" ")}`,
      );
    const moved = await lookAt(location, to, "", hosts);
    await rememberPins(moved);
    for (const member of membersBelow(moved, null))
      await rememberPins(await lookAt(location, join(to, member), "", hosts));
  }
}

/** Makes the record of a folder name the copies of pins that moved there. */
async function rememberPins(moved: Folder): Promise<void> {
  const stands = ({ pin }: KnownDestination) =>
    moved.subvolumes.some(({ uuid }) => uuid === pin?.uuid);
  for (const [prefix, chain] of moved.record.chains) {
    const destinations = (chain.destinations ?? []).map((known) =>
      stands(known) ? known : withPinIn(known, moved.standing),
    );
    if (chain.destinations !== undefined && !sameRecord(chain, { ...chain, destinations }))
      await writeRecord({ ...moved, prefix }, { ...chain, destinations });
  }
}

function tellWhatIsNext(r: Restoration): void {
  const { o, chosen, target, kept } = r;
  if (o.dryRun) {
    log.info("Nothing was changed");
    return;
  }
  log.info(`Done: ${o.target.id} is as it was in ${chosen.name}`);
  tellWhoseBackups(r);
  if (kept !== null && target.existing !== null) tellOfOld(r, kept, target.existing.path);
}

/** The command by which TARGET becomes the source of others' backups. */
function adoptingRun({ snapshotFolder: folder, target }: RestoreOptions, prefix: string): string {
  const command = [
    "btrfs-backup",
    "--adopt",
    ...(prefix === "" ? [] : ["-p", prefix]),
    ...(folder === "snapshot" ? [] : ["-f", folder]),
    target.id,
  ];
  return command.map(shellWord).join(" ");
}

/** Says whose the backups, or the snapshots, are where TARGET is not their source by itself. */
function tellWhoseBackups(r: Restoration): void {
  const { o, report, location, chosen, target, moved, replaced, chains } = r;
  const { id, prefix, store, chain } = location;
  const ours = { uuid: "", host: target.hostName, path: target.known };
  const from = `${ours.host}:${ours.path}`;
  const adopt = adoptingRun(o, prefix);
  const adopting = `If that shall be their source from now on: ${adopt} ${shellWord(id)}`;
  const place = store?.streams.find(({ uuid }) => uuid === chosen.uuid)?.owner.place;
  if (place !== undefined && place !== ownerOf(ours).place)
    log.info(
      `The streams in ${id} were stored from another host or path: a run from ${from} is refused. ${adopting}`,
    );
  if (chains.size > 0 && !replaced) {
    if (moved.length > 0)
      report.warning(
        `${location.path} has no longer what its destinations share with it: they go on from ${o.target.id}, once it has the path of their source or by "${adopt} DEST…"`,
      );
    return;
  }
  const { owner } = chain;
  if (isSnapshotFolder(location) || location.place.filesystem === target.place.filesystem) return;
  if (owner !== undefined && (owner.host !== ours.host || owner.path !== ours.path))
    log.info(
      `The backups in ${id} belong to ${owner.host}:${owner.path}: a run goes on from there, but is refused from ${from}. ${adopting}`,
    );
}

/** Says where the subvolume is that was replaced, and how to delete it with all that is in it. */
function tellOfOld({ o, report, target, moved }: Restoration, kept: string, old: string): void {
  const gone = new Set(moved.map(({ path }) => path));
  const below = target.subvolumes
    .filter(({ path }) => path.startsWith(`${old}/`) && !gone.has(path))
    .map(({ path }) => path.slice(old.length));
  const words =
    below.length <= 3
      ? below.map((path) => quote(kept + path))
      : [...new Set(below.map((path) => `${quote(kept + dirname(path))}/*`))];
  if (below.length > 0)
    report.warning(
      explained(
        o.through,
        `${plural(below.length, "subvolume")} below the old ${o.target.id} ${below.length === 1 ? "is" : "are"} now below ${kept}`,
      ),
    );
  log.info(
    explained(
      o.through,
      `The old one is ${kept}. When you do not need it any more: btrfs subvolume delete ${[...words.reverse(), quote(kept)].join(" ")}`,
    ),
  );
}

// ── restore: TARGET is a mount point ──
//
// The name of a mounted subvolume can be given to another one where the top level of its filesystem
// is mounted. So that is mounted, for as long as the restore takes, in a mount namespace that nobody
// else sees, and TARGET is its path there. What is mounted stays the old subvolume.

/** A TARGET that is a mount point, seen from the top level of its filesystem. */
type Through = {
  /** As it is mounted for everybody. */
  readonly mount: Mount;
  /** Where the top level is mounted. */
  readonly spot: string;
  /** The path from the top level that TARGET has from now on. */
  readonly root: string;
  /** The ID of the default subvolume before. */
  readonly standard: number;
  readonly remount: Remount;
  /** The path of TARGET's snapshot folder there. */
  readonly folder: string;
};

type Entered = {
  readonly target: Readable;
  readonly through: Omit<Through, "folder">;
  readonly release: () => Promise<void>;
};

/** A subvolume's mount point; null where a path is none, or one of a top level. Errors: Failure. */
async function mountedAt(location: Readable, hosts: Hosts) {
  const { path } = location;
  const parent = await lookAt(location, dirname(path), "", hosts);
  const full = join(parent.path, basename(path));
  const mount = parent.mounts.findLast((one) => one.path === full);
  if (mount === undefined || mount.root === "/") return null;
  const seen = await lookAt(location, full, "", hosts);
  if (seen.place.filesystem === null)
    throw new Failure(`${location.id} is a mount point, and not on btrfs`);
  return { mount, seen };
}

/**
 * Mounts the top level of the filesystem that a subvolume is mounted from, for us alone; null where
 * that is not needed, or cannot be. Errors: Failure, with `advice` where no mount can be had.
 */
async function enterTop(
  location: Readable,
  hosts: Hosts,
  advice: (mount: Mount) => string,
): Promise<Entered | null> {
  const found = await mountedAt(location, hosts);
  if (found === null) return null;
  const { mount, seen } = found;
  needRoot(seen, "restoring");
  needRoot({ ...seen, alone: seen.user !== "0" }, "restoring: --sudo is not enough;");
  if (mount.readonly)
    throw new Failure(
      `${location.id} is mounted read-only: mount -o remount,rw ${quote(mount.path)}`,
    );
  const root = replacedBy(mount, seen.mounts, seen.subvolumes);
  const host = { ...plainHost(seen.host), sudo: false, fence: "own" as const };
  const end = `${crypto.randomUUID()} end`;
  const { output, release } = await holdVerb(
    host,
    TOP,
    {
      device: mount.device,
      filesystem: seen.place.filesystem ?? "",
      end,
      silence: secondsOfSilence(host),
    },
    { end, what: `the top level of ${mount.device} cannot be mounted in a mount namespace` },
  ).catch((error: Error) => {
    if (!(error instanceof Failure) || error instanceof Unreachable) throw error;
    throw new Failure(`${advice(mount)}\n(${error.message})`);
  });
  const [namespace = "", spot = "", standard = "", kernel = "", ...fstab] = output.split("\n");
  const target = { ...location, namespace, path: join(spot, root) };
  const told = { kernel, fstab: fstab.join("\n"), mounts: seen.mounts };
  try {
    if (!/^\d+$/.test(namespace) || !spot.startsWith("/"))
      throw new Failure(`cannot read what was printed of the top level: ${output.slice(0, 100)}`);
    const there = await lookAt(target, dirname(target.path), "", hosts);
    if (there.place.filesystem !== seen.place.filesystem)
      throw new Failure(`${mount.device} is another filesystem than that of ${location.id}`);
  } catch (error) {
    await release();
    throw error;
  }
  const through = {
    mount,
    spot,
    root,
    standard: Number(/^ID (\d+) /.exec(standard)?.[1] ?? 0),
    remount: planRemount(mount, root, told),
  };
  return { target, through, release };
}

/** The options of a restore as they are where the top level is mounted. */
async function optionsThrough(
  o: RestoreOptions,
  { target, through }: Entered,
): Promise<RestoreOptions> {
  const { filesystem } = (await lookAt(target, dirname(target.path), "", o.hosts)).place;
  const seenThere = async (path: string) => {
    const seen = await lookAt(o.target, path, "", o.hosts);
    return seen.place.filesystem === filesystem ? join(through.spot, seen.top) : path;
  };
  const folder = resolve(o.target.path, o.snapshotFolder);
  const { parentFrom } = o;
  return {
    ...o,
    through: {
      ...through,
      folder: isWithin(folder, o.target.path)
        ? join(target.path, relative(o.target.path, folder))
        : await seenThere(folder),
    },
    target,
    parentFrom:
      parentFrom === null
        ? null
        : await seenThere(o.target.host === null ? resolve(parentFrom) : parentFrom),
  };
}

/** Goes on with a restore to a mount point that was interrupted. Errors: those of finishRestores. */
async function finishBesideMounted(source: Readable, hosts: Hosts): Promise<void> {
  const entered = await enterTop(
    source,
    hosts,
    () => `a restore of ${source.id} was interrupted, and cannot be finished from here`,
  );
  if (entered === null) return;
  try {
    await finishRestores(entered.target, entered.target.path, hosts);
  } catch (error) {
    if (error instanceof Error) error.message = explained(entered.through, error.message);
    throw error;
  } finally {
    await whileCleaning(entered.release);
  }
}

/** The path of TARGET's snapshot folder. */
const snapshotFolderIn = ({ through, target, snapshotFolder }: RestoreOptions) =>
  through?.folder ?? resolve(target.path, snapshotFolder);

/** The path of TARGET for everybody. */
const knownPath = ({ through }: RestoreOptions, full: string) => through?.mount.path ?? full;

/** A text with paths that everybody can reach, once the top level is mounted. */
function explained(through: Entered["through"] | undefined, text: string): string {
  if (through === undefined) return text;
  const { spot, mount } = through;
  const named = text.replaceAll(`${spot}/`, "/mnt/");
  const how = `(/mnt stands for the top level: mount -o subvolid=5 ${quote(mount.device)} /mnt)`;
  return named === text || text.includes(how) ? text : `${named} ${how}`;
}

/** Where the replaced subvolume is, and what is to be done to mount the new one, for programs. */
function namesIn({ o: { through }, kept }: Restoration) {
  if (through === undefined || kept === null) return { before: kept };
  return { before: kept.slice(through.spot.length), remount: through.remount.command };
}

/** Says what makes everybody see what was restored. */
function tellRemount({ o, report, target }: Restoration): void {
  if (o.through === undefined || o.dryRun) return;
  const { remount, mount, root, standard } = o.through;
  if (target.existing?.id === standard)
    log.info(`${root.slice(1)} is the default subvolume, as the old one was`);
  for (const problem of remount.wrong) report.warning(problem);
  if (remount.others.length > 0)
    report.warning(`the old one is mounted at ${remount.others.join(", ")} as well`);
  log.info(
    mount.path === "/"
      ? "The old one is what runs until the next start: reboot"
      : `${mount.path} is the old one until it is mounted anew: ${remount.command}`,
  );
}

// ── restore: a whole tree ──

/** A restore of a tree, of which all is decided. */
type TreeRestoration = {
  /** TARGET itself; where that is a plain directory, what is common to all. */
  readonly head: Restoration;
  /** All subvolumes, each after the one around it. */
  readonly parts: readonly Restoration[];
};

/** Makes TARGET, and all subvolumes below it, as they were at one run. */
async function restoreTree(o: RestoreOptions, report: Report): Promise<void> {
  if (!o.dryRun) await finishRestores(o.target, o.target.path, o.hosts);
  const root = await openTreeRoot(o.location, { ...o, wait: o.dryRun ? "look" : o.wait });
  const opened = [root];
  try {
    const tree = await openTree(root, o.location, o);
    const plan = chooseTree(tree, o, report);
    const target = await openTarget(o, root.prefix);
    const outside = target.inside === null ? await openOutside(target, root, o) : null;
    if (outside !== null && outside !== root) opened.push(outside);
    const parents = await openParents(target, o);
    if (root.store === null) compressionBetween(root, target, o.sending.level);
    const [newest] = [...plan.chosen.values()].sort((one, other) => other.time - one.time);
    const common = { o, report, display: displayOf(o), target, outside, parents };
    const whole = { ...common, location: root, chosen: newest as Snapshot, member: "" };
    const decided = await decideTree({ ...whole, tree: recordedTree(tree, plan) }, tree, plan);
    const { head, parts } = decided;
    await lockOthers(decided, opened);
    const sums: Arriving["sums"][] = [];
    for (const one of parts) {
      warnAhead(one);
      sums.push(await readyPieces(one, one.data.way === "streams" ? one.data.pieces : []));
    }
    await clearLeftovers(head, null);
    parts.forEach(tellPlan);
    if (!o.dryRun) await carryOutTree(decided, sums);
    for (const {
      location: { id },
      chosen: { name },
      o: { target: to },
    } of parts)
      report.event("restore", { location: id, name, target: to.id, ...namesIn(head) });
    tellWhatIsNext(head);
    tellRemount(head);
  } finally {
    await whileCleaning(async () => {
      for (const folder of opened) await folder.close();
    });
  }
  report.event("summary", { ok: !report.failed });
}

/** Chooses what each member gives. Errors: Failure telling what there is. */
function chooseTree({ root, members }: Tree, o: RestoreOptions, report: Report): TreePlan {
  const { id } = root;
  const all = new Map([["", root], ...members]);
  const whole = new Map([...all].map(([path, folder]) => [path, wholeIn(folder)]));
  const own = whole.get("") ?? [];
  // The newest run is that of any member: with --if-changed, the root can lack it.
  const isOfRoot = own.some(({ name }) => name === o.snapshot);
  const pool = [...whole.values()].flat().sort((a, b) => a.time - b.time);
  const lacking = members.size === 0 || pool.length === 0;
  if (members.size === 0)
    report.warning(`${id}: there are no subvolumes of a tree below it, only its own backups`);
  const named = pool.findLast(({ name, time }) =>
    o.snapshot === null ? time <= (o.before ?? Infinity) : name === o.snapshot,
  );
  const asOf = isOfRoot || lacking || named === undefined ? chooseSnapshot(root, o) : named;
  const giving = new Map([...all].map(([path, folder]) => [path, earlierIn(folder, asOf)]));
  const plan = planTree(asOf, giving, root.chain.tree?.gone ?? {});
  if (own.length > 0 && !plan.chosen.has(""))
    throw new Failure(`${id}: nothing of the root of the tree is as old as ${asOf.name}`);
  const called = (paths: readonly string[]) =>
    someOf(
      paths.map((path) => (path === "" ? id : path)),
      5,
    );
  if (plan.earlier.length > 0)
    report.warning(
      `${id}: ${plural(plan.earlier.length, "subvolume")} of the tree ${plan.earlier.length === 1 ? "has" : "have"} no backup ${asOf.name}; the newest one before it is taken: ${called(plan.earlier)}`,
    );
  if (plan.gone.length > 0)
    log.info(
      `${id}: not restored, since gone before ${asOf.name}: ${called(plan.gone)} (the backups are still there)`,
    );
  return plan;
}

/**
 * What a member of a tree can give as of a run. Where another subvolume had its path then, the
 * backups of that are strangers to it by now.
 */
function earlierIn(folder: Folder, { time }: NamedTime): readonly Snapshot[] {
  const whole = wholeIn(folder);
  if (whole.some((one) => one.time <= time)) return whole;
  return wholeIn({ ...folder, chain: { ...folder.chain, strangers: [] } });
}

/** What a restored root's record says of the tree: what had gone by then. */
const recordedTree = ({ root }: Tree, { gone }: TreePlan): ChainRecord["tree"] => ({
  gone: Object.fromEntries(gone.map((path) => [path, root.chain.tree?.gone[path] ?? ""])),
});

/** Decides how each member comes. Errors: those of decideRestore. */
async function decideTree(whole: Restore, tree: Tree, plan: TreePlan): Promise<TreeRestoration> {
  const parts: Restoration[] = [];
  for (const [path, chosen] of plan.chosen)
    parts.push(
      await decideRestore(
        path === ""
          ? { ...whole, chosen }
          : await memberRestore(whole, [path, tree.members.get(path) as Folder], chosen),
      ),
    );
  const [first] = parts;
  const { work = "", kept = null } = first ?? {};
  const same = parts.map((one) => ({ ...one, work, kept }));
  const root = same.find(({ member }) => member === "") ?? {
    ...(same[0] as Restoration),
    ...whole,
    ...decideMoves(whole),
    moved: [],
    data: { way: "reflink", origin: "" } as const,
    how: "none" as const,
  };
  const to = snapshotFolderOf(whole);
  const moved = same.flatMap((one) => movedBelow(one, root, to));
  return { head: { ...root, moved }, parts: same };
}

/** A member's snapshots that move, by names below the folders of the root's. Errors: Failure. */
function movedBelow(one: Restoration, root: Moves, to: string): Entry[] {
  const { target, member, location } = one;
  if (one.moved.length === 0) return [];
  const there = snapshotFolderOf(one);
  const below = relative(root.from, one.from);
  if (below !== relative(to, there))
    throw new Failure(
      `the snapshots in ${location.path} cannot move to ${join(target.full, member)} together with the others`,
    );
  return one.moved.map((entry) => ({ ...entry, name: join(below, entry.name) as EntryName }));
}

/** The restore of one member. Errors: Failure where its snapshot folder cannot be looked at. */
async function memberRestore(
  whole: Restore,
  [member, location]: readonly [string, Folder],
  chosen: Snapshot,
): Promise<Restore> {
  const { target, outside, parents, location: root } = whole;
  const o = { ...whole.o, target: placeBelow(whole.o.target, member) };
  const own = ownFoldersIn(root, root.prefix).get(member) ?? null;
  const standard = target.inside === null ? null : join(target.inside, member);
  return {
    ...whole,
    o,
    location,
    chosen,
    member,
    tree: null,
    target: { ...target, inside: own ?? standard },
    outside: outside === null || own !== null ? null : await outsideOf(whole, [member, location]),
    parents: parents && { ...parents, top: join(parents.top, member) },
  };
}

/** A member's folder below the snapshot folder outside of TARGET; it may not be there yet. */
async function outsideOf(
  { o, target, outside, location: root }: Restore,
  [member, location]: readonly [string, Folder],
): Promise<Folder> {
  const above = outside as Folder;
  if (above === root) return location;
  const path = join(besideTarget({ o, target }, above), member);
  const seen = await lookAt(o.target, path, target.prefix, o.hosts).catch((error: Error) => {
    if (error instanceof NoDirectoryAbove) return null;
    throw error;
  });
  if (seen?.exists) return seen;
  const empty = { standing: [], snapshots: [], entries: new Set<string>(), chain: {} };
  return { ...above, ...empty, path, top: join(above.top, member), record: parseRecord("") };
}

/** Where NEST puts a member, and its snapshot: below `folder`, with the lock of that, if `within`. */
function nestOf({ outside, member, target }: Restore, folder: string) {
  const isBelow = outside !== null || !isWithin(target.inside ?? "", member);
  const base = isBelow ? folder.slice(0, -member.length - 1) : folder;
  return { member, base, within: isBelow ? member : "", prefix: target.prefix };
}

/**
 * Locks what the root's lock does not: members with a folder of their own, and chains of other
 * prefixes whose snapshots move as well. Of another tree, its root's lock is that of all; to ask
 * for it twice would be to wait for oneself. `opened` gets what is to be closed. Errors: Busy.
 */
async function lockOthers({ head, parts }: TreeRestoration, opened: Folder[]): Promise<void> {
  const { o, location: root } = head;
  const locked = new Set([JSON.stringify([root.path, root.prefix])]);
  for (const { moved, location, member } of o.dryRun || root.store !== null ? [] : parts) {
    // In the fence, a folder of a tree that was opened by itself is one that has a lock of its own.
    const isAlone = root.fenced && member !== "" && location.join === undefined;
    const isOwn = location.path !== join(root.path, member);
    for (const prefix of new Set([root.prefix, ...prefixesIn(moved)])) {
      const isTree = prefix === root.prefix || root.record.chains.get(prefix)?.tree !== undefined;
      const isRoots = isTree && !isOwn && !(isAlone && prefix === root.prefix);
      const path = isRoots ? root.path : location.path;
      const key = JSON.stringify([path, prefix]);
      if (locked.has(key)) continue;
      locked.add(key);
      opened.push(await openFolder(o.location, path, openingOf(o, prefix)));
    }
  }
}

/** Builds the whole tree beside TARGET, and gives it its name. Errors: SameSecond, Failure. */
async function carryOutTree(
  { head, parts }: TreeRestoration,
  sums: readonly Arriving["sums"][],
): Promise<void> {
  await inWork(head, async (folder, release) => {
    for (const [i, one] of parts.entries()) {
      await build({ ...one, folder, sums: sums[i] ?? new Map() });
      checkInterruption();
    }
    if (parts[0]?.member !== "") await writePlainRoot(head);
    await giveNames(head, release);
    for (const one of parts)
      if (one.moved.some(({ receivedUuid }) => receivedUuid !== null))
        await writeRestoredRecords(one, one.target.full, null);
  });
}

/** The record of a tree whose root is a plain directory: there is a tree. */
async function writePlainRoot(r: Restoration): Promise<void> {
  const { o, target, outside, work, tree } = r;
  const inside = join(target.path, work, "tree", target.inside ?? "");
  const path = outside === null ? inside : besideTarget(r, outside);
  const folder = await lookAt(o.target, path, target.prefix, o.hosts);
  if (tree !== null) await writeRecord(folder, { ...folder.chain, tree });
  const made = outside === null ? "; its snapshots are in it: a run needs -f with their path" : "";
  log.info(
    `${target.full} is a plain directory: its owner and mode are not in the backups, and it is root's alone now${made}`,
  );
}

// ── scratch: what is received for a while, and removed ──

/** What the directories of such work begin with, in the folder where it is done. */
const SCRATCH = ".btrfs-backup-scratch";

/** How streams are received for a while. `scratch`: the folder that the user named. */
type ScratchOptions = Pick<
  RestoreOptions,
  "hosts" | "dryRun" | "sending" | "btrfsDebug" | "unverified"
>;

/** A directory where subvolumes are received for a while, below `target`. */
type Scratch = { readonly folder: Folder; readonly target: Folder; readonly work: string };

/**
 * Does work in a directory of its own in a folder of this host, which is removed however the work
 * ends. What other work that was killed left there goes first. Errors: Failure, also where the
 * folder's filesystem gets nearly full, unless the work `isSpare`, and takes no space there.
 */
async function inScratch<T>(
  o: Pick<ScratchOptions, "hosts">,
  place: Readable,
  work: (scratch: Scratch) => Promise<T>,
  isSpare: (folder: Folder) => boolean = () => false,
): Promise<T> {
  for (;;)
    try {
      return await inScratchOnce(o, place, work, isSpare);
    } catch (error) {
      if (!(error instanceof SameSecond)) throw error;
      await nextSecond();
    }
}

async function inScratchOnce<T>(
  { hosts }: Pick<ScratchOptions, "hosts">,
  place: Readable,
  work: (scratch: Scratch) => Promise<T>,
  isSpare: (folder: Folder) => boolean,
): Promise<T> {
  const folder = await lookAt(place, place.path, "", hosts);
  const { path, place: on, user, host } = folder;
  if (!folder.exists) throw new Absent(`no such directory: ${path} (is the disk mounted?)`);
  if (on.filesystem === null)
    throw new Failure(`${path} is not on btrfs: --scratch DIR names a folder that is`);
  needRoot(folder, "receiving for a while");
  needRoot({ ...folder, alone: host.sudo && user !== "0" }, "receiving: --sudo is not enough;");
  needOurs(folder, place.id);
  const target = { ...folder, name: SCRATCH };
  const name = `${SCRATCH}.restoring-${stamp(new Date())}`;
  const r = { o: { target: place, hosts, dryRun: false }, target, work: name };
  await clearScratch(r);
  return inWork(r, async (own, release) => {
    const working = () => work({ folder: own, target: folder, work: name });
    const result = await (isSpare(folder) ? working() : withRoomLeft(own, working));
    await whileCleaning(async () => {
      await release();
      // Another of these commands may be about to remove it, and has it locked for that.
      await clearLeftovers(r, name).catch(async () => {
        await nextSecond();
        await clearLeftovers(r, name);
      });
    });
    return result;
  });
}

/** Removes what work that was killed left in a folder; not what is still at work. */
async function clearScratch(r: Workplace): Promise<void> {
  for (const name of leftoversOf(SCRATCH, r.target).keys()) {
    const full = join(r.target.path, name);
    await clearLeftovers(r, name).then(
      (isOurs) => {
        if (isOurs) log.info(`Removed what an interrupted command left: ${full}`);
      },
      (error: Error) => {
        checkInterruption();
        if (error instanceof Busy) log.info(`${full} is left alone: ${error.message}`);
        else log.warn(error.message);
      },
    );
  }
}

/** In ms: how much time is between two looks at what is left, where it would last long, and at least. */
const LOOKING_AT_ROOM = { far: 1000, near: 50 };

/**
 * Does work as long as the filesystem of a folder is not nearly full. What is received is only in
 * memory for a while, and takes no space as long: so it is written to the disk for each look.
 * Errors: NoSpace.
 */
async function withRoomLeft<T>(folder: Folder, work: () => Promise<T>): Promise<T> {
  const off = new AbortController();
  const { size } = folder.place;
  const stoppedAt = (free: number) =>
    new NoSpace(
      `${folder.id}: stopped, since only ${inBytes(free)} of ${inBytes(size)} are left there: --scratch DIR names a folder with more room`,
    );
  const needRoom = async (cleaned: "files" | "subvolumes") => {
    const { bytes: free } = await freeNow(folder, cleaned);
    if (!isNearlyFull(free, size)) return free;
    // What was deleted goes only after a while, and never while anybody has a file of it open.
    if (cleaned === "files") return needRoom("subvolumes");
    throw stoppedAt(free);
  };
  const first = await needRoom("files");
  let isOver = false;
  const ended = calledOff.run(off.signal, work).finally(() => (isOver = true));
  const watch = async () => {
    for (let [before, since] = [first, Date.now()]; !isOver;) {
      const began = Date.now();
      const free = await needRoom("files");
      const now = Date.now();
      const rate = Math.max(0, before - free) / Math.max(1, now - since);
      const lasts = (free - size / 10) / rate / 3;
      [before, since] = [free, now];
      const most = Math.max(LOOKING_AT_ROOM.far, 2 * (now - began));
      await isOverWithin(Math.max(LOOKING_AT_ROOM.near, Math.min(most, lasts)), ended);
    }
  };
  // That it could not be looked is told by the work itself, which needs the same disk.
  const watching = watch().catch((error: Error) => {
    if (error instanceof NoSpace) off.abort(error);
    else log.debug(error.message);
  });
  try {
    return await ended;
  } catch (error) {
    if (off.signal.aborted) throw off.signal.reason;
    // What comes fast can fill the disk between two looks.
    throw error instanceof NoSpace ? stoppedAt(0) : error;
  } finally {
    await watching;
  }
}

/** Streams of a store that are received for a while. */
type Visiting = {
  readonly o: ScratchOptions;
  readonly report: Report;
  readonly display: Display;
  readonly location: Folder;
  readonly store: Store;
  readonly visits: readonly Visit[];
  readonly place: Readable;
};

/**
 * Receives stored streams, one at a time, and lets `see` look at each that is wanted. `lost`: told
 * of one that cannot be received, and what builds on it is passed over; else that is an error.
 */
async function visitStreams(
  { o, place, store, visits, ...of }: Visiting,
  see: (piece: Stream, scratch: Folder) => Promise<void>,
  lost?: (error: Failure) => void,
): Promise<void> {
  await inScratch(o, place, ({ folder, target }) => {
    const arrival = { ...of, o: { ...o, target: place }, folder, target };
    return receiveVisits(arrival, { store, visits, see: (piece) => see(piece, folder), lost });
  });
}

/** The streams that are received one after the other, and what is done with them: see visitStreams. */
type Visited = Pick<Visiting, "store" | "visits"> & {
  readonly see: (piece: Stream) => Promise<void>;
  readonly lost: ((error: Failure) => void) | undefined;
};

async function receiveVisits(
  arrival: Omit<Arrival, "sums">,
  { store, visits, see, lost }: Visited,
): Promise<void> {
  const { folder } = arrival;
  const pieces = visits.map(({ piece }) => piece);
  const summed = { ...arrival, sums: await readyPieces(arrival, pieces) };
  const there = new Set<string>();
  for (const [i, { piece, isWanted, gone }] of visits.entries()) {
    const { name, uuid, parentUuid } = piece;
    if (parentUuid !== null && !there.has(parentUuid)) continue;
    const label = `${i + 1}/${pieces.length} ${name}`;
    try {
      await receivePiece(summed, store, piece, { label, isFirst: false });
      there.add(uuid);
    } catch (error) {
      const isLost = error instanceof Failure && !(error instanceof NoSpace);
      if (lost === undefined || !isLost || calledOff.getStore()?.aborted) throw error;
      checkInterruption();
      lost(error);
      await discardReceived(arrival, name, "whole");
      continue;
    }
    if (isWanted) await see(piece);
    const going = gone.map((one) => ({ name: one.name, id: null }));
    if (going.length > 0) await deleteFrom(folder, going, { convertRw: false, sync: false });
  }
}

/**
 * Where streams are received: the folder of --scratch; else `beside`, if they leave enough of what
 * is free there. Errors: Failure asking for --scratch.
 */
function scratchPlace(
  scratch: Readable | null,
  beside: { readonly location: Readable; readonly folder: Folder } | null,
  visits: readonly Visit[],
): Readable {
  if (scratch !== null) return scratch;
  const bytes = bytesOf(visits.map(({ piece }) => piece));
  const what = `${plural(visits.length, "stream")} of ${inBytes(bytes)} must be received for a while`;
  const advice = "--scratch DIR names a folder on btrfs for that";
  if (beside === null || beside.folder.host.ssh !== null) throw new Failure(`${what}: ${advice}`);
  const { folder, location } = beside;
  if (folder.place.filesystem === null)
    throw new Failure(`${what}, and ${folder.path} is not on btrfs: ${advice}`);
  if (!fitsBeside(bytes, folder.place.free))
    throw new Failure(
      `${what}, and could take more than half of the ${inBytes(folder.place.free)} that are free in ${folder.path}: ${advice}`,
    );
  return { ...location, path: folder.path, id: folder.path };
}

/**
 * What PUT makes of a path in a subvolume of a folder, on a host: a copy, or a reflinked one where
 * it `isSlowed` by nothing.
 */
async function copyOut(
  [folder, name]: readonly [Folder, string],
  inner: string,
  host: Host,
  { put, between = [], isSlowed = false }: Copying,
): Promise<void> {
  const take = { ...at(folder), snapshot: name, inner };
  const there: Host = { ...host, fence: "try" };
  const given = { ...put, base: basename(inner) };
  if (sameHost(folder.host, host) && !isSlowed)
    await ask(there, PUT, { ...given, ...take }, `cannot copy ${inner.slice(1)}`);
  else
    await pipeline([
      verbStage("tar", folder.host, TAKE, take),
      ...between,
      verbStage("tar", there, PUT, given),
    ]);
}
type Copying = {
  readonly put: Pick<ArgumentsOf<typeof PUT>, "directory" | "name" | "force">;
  readonly between?: readonly Stage[];
  readonly isSlowed?: boolean;
};

// ── restore: a file or directory of a backup ──

/** Makes TARGET what a path is in a backup. */
async function restorePath(o: RestoreOptions, given: string, report: Report): Promise<void> {
  const { dryRun, wait } = o;
  const location = await openLocation(o.location, { ...o, wait: dryRun ? "look" : wait });
  try {
    const chosen = chooseSnapshot(location, o);
    const parent = await lookAt(o.target, dirname(o.target.path), "", o.hosts);
    const below = pathBelow(given, withOwnerOf(given, location, parent));
    if (below === "") throw new UsageError("--path is all of the backup: leave the option out");
    const name = basename(o.target.path);
    if (!parent.exists) throw new Failure(`no such directory: ${parent.path}`);
    if (parent.entries.has(name))
      throw new Failure(`${o.target.id} exists: name what is to be made`);
    const wanted = { o, report, location, chosen, parent, inner: `/${below}` };
    const { store } = location;
    if (store === null) await restorePathFrom(wanted, [location, chosen.name]);
    else await restoreStoredPath(wanted, store);
    report.event("restore", {
      location: location.id,
      name: chosen.name,
      target: o.target.id,
      path: below,
    });
  } finally {
    await whileCleaning(location.close);
  }
  report.event("summary", { ok: !report.failed });
}

/**
 * A location with its owner, as far as a path tells that: streams have only a digest of its host
 * and path.
 */
function withOwnerOf(path: string, location: Folder, { hostName: host }: Folder) {
  const { store, chain } = location;
  const places = new Set(store?.streams.map(({ owner }) => owner.place));
  const names = normalize(path).split("/");
  const known = names
    .map((_, i) => ({ uuid: "", host, path: names.slice(0, i + 1).join("/") || "/" }))
    .findLast((one) => places.has(ownerOf(one).place));
  return { ...location, chain: known === undefined ? chain : { owner: known } };
}

/** A path of a backup that is to be restored. `parent`: the directory of TARGET. */
type WantedPath = Pick<Restore, "o" | "report" | "location" | "chosen"> & {
  readonly parent: Folder;
  readonly inner: string;
};

/** Copies a path out of a subvolume. Errors: Failure where there is no such path. */
async function restorePathFrom(
  { o, location, chosen, inner }: WantedPath,
  [folder, name]: readonly [Folder, string],
): Promise<void> {
  const shown = shownPath(Buffer.from(inner.slice(1)).toString("latin1"));
  const states = await statesIn(folder.host, at(folder), inner, [name]);
  if (!states.has(name))
    throw new Failure(
      `${location.id}: there is no ${shown} in ${chosen.name} (paths begin at the top of the backup, and no symbolic link is followed)`,
    );
  log.info(
    `${o.dryRun ? "Would restore" : "Restoring"} ${shown} of ${chosen.name} from ${location.id} to ${o.target.id}`,
  );
  if (o.dryRun) return;
  const host = hostOf(o.target.host, o.hosts);
  const { path } = o.target;
  const put = { directory: dirname(path), name: basename(path), force: "" };
  const called = `${basename(inner)} to ${o.target.id}`;
  const { rate } = o.sending;
  const between = meter(called, displayOf(o), rate, { size: () => undefined });
  // What comes out of a store was slowed down as it came.
  const isSlowed = rate !== null && location.store === null;
  await copyOut([folder, name], inner, host, { put, between, isSlowed });
}

/** Receives the streams of a backup for a while, and copies a path out of it. */
async function restoreStoredPath(wanted: WantedPath, store: Store): Promise<void> {
  const { o, report, location, chosen, parent } = wanted;
  const visits = planVisits(new Set([chosen.uuid]), store.streams);
  const place = scratchPlace(o.scratch, { location: o.target, folder: parent }, visits);
  const bytes = bytesOf(visits.map(({ piece }) => piece));
  log.info(
    `${o.dryRun ? "Would receive" : "Receiving"} ${plural(visits.length, "stream")} of ${location.id}, ${inBytes(bytes)}, for a while in ${place.path}`,
  );
  if (o.dryRun) return;
  const visiting = { o, report, display: displayOf(o), location, store, visits, place };
  await visitStreams(visiting, (piece, folder) => restorePathFrom(wanted, [folder, piece.name]));
}

// ── list: what each location has ──

export type ListOptions = ReturnType<typeof listOptions>;

/** Shows what each location has of each snapshot. */
export async function list(o: ListOptions, report: Report): Promise<void> {
  const now = wallClock(new Date());
  if (o.maxAge !== null) return listAges({ ...o, maxAge: o.maxAge }, report);
  const addKnown = o.locations.length === 1;
  const looking = { ...o, prefix: o.prefix ?? "", mayBeAway: o.optional };
  const columns = await openColumns(o.locations, addKnown, looking, report);
  const found = columns.map(async (column) =>
    o.prefix !== null ? [o.prefix] : prefixesToList(column, o, report),
  );
  const prefixes = (await Promise.all(found)).flat();
  for (const prefix of new Set(prefixes.length === 0 ? [""] : prefixes)) {
    const shown = await allOf(
      columns.map(async (column) => ({
        ...column,
        folder: column.folder && (await withNotes(underPrefix(column.folder, prefix), report)),
      })),
    );
    const sizes = shown.map(({ id, folder }) =>
      o.size && folder ? sizesIn(folder).catch((error) => (report.error(id, error), [])) : [],
    );
    const all = inventory(shown, o, now, new Map((await Promise.all(sizes)).flat()));
    const listed = { ...all, snapshots: all.snapshots.slice(0, o.last) };
    report.event("list", { prefix, ...listed });
    if (!o.json) print(inventoryTable(columns, listed, now, all.snapshots.length));
    await listTrees(shown, o, prefix, report);
  }
  report.event("summary", { ok: !report.failed });
}

/** A column of a table: a location that could be opened, or why not. */
type Column = {
  readonly id: string;
  readonly folder: Folder | null;
  readonly problem: string | null;
  /** It was not opened. */
  readonly left?: true;
  /** It is not there, and need not be. */
  readonly away?: true;
};

/** How columns are opened. */
type Looking = LookOptions & {
  /** Destinations that need not be there, besides those of which a record says so; none otherwise. */
  readonly mayBeAway?: ReadonlySet<string>;
  /** Whatever is wrong with a place concerns no other one. */
  readonly apart?: boolean;
};

/** Directories below a folder where snapshots stand, for whoever named one that is too high. */
export function foldersBelow({
  top,
  path,
  subvolumes,
}: Pick<Folder, "top" | "path" | "subvolumes">) {
  const above = top === "/" ? "/" : `${top}/`;
  const below = subvolumes
    .map((one) => `/${one.path}`)
    .filter((one) => one.startsWith(above) && prefixOf(basename(one)) !== null)
    .map((one) => join(path, dirname(one).slice(above.length)));
  return [...new Set(below)].filter((one) => one !== path);
}

/** The end of a message about a folder without snapshots. */
function hintBelow(folder: Folder): string {
  const [first, ...more] = prefixesIn(folder.standing).length > 0 ? [] : foldersBelow(folder);
  if (first === undefined) return "";
  return `; ${first} has some${more.length > 0 ? `, and ${more.length} more below it` : ""}`;
}

/** What stands behind a column's name. */
function whyEmpty({ folder, problem, left, away }: Column): string {
  if (problem === null) return folder === null ? "" : hintBelow(folder);
  if (away) return ", optional, not there now";
  return left ? `, not looked at: ${problem}` : ", cannot be read";
}

/** What a column is called below its legend. */
const columnLetter = (i: number) => (i < 26 ? String.fromCharCode(65 + i) : String(i));

type OpenedColumn = Column & { readonly error?: Error };

/**
 * The first location, and the others: the given ones, and with `addKnown` those that the first one
 * knows if it is a SOURCE. They are opened side by side, and told of in order.
 */
async function openColumns(
  [first, ...others]: readonly Location[],
  addKnown: boolean,
  o: Looking,
  report: Report,
): Promise<Column[]> {
  const early = { ...o, prefix: o.prefix ?? "" };
  const open = (location: Location) => ({ location, opening: openColumn(location, early) });
  const asked = new Map(others.map((location) => [location.id, open(location)]));
  const source = tellProblem(await openColumn(first as Location, o), o, report);
  const { folder } = source;
  const remembered = new Map(folder === null ? [] : knownTo(folder));
  const doubt = folder && doubtOf(folder);
  const added = addKnown ? [...remembered.keys()].filter((id) => !asked.has(id)) : [];
  if (doubt === null) for (const id of added) asked.set(id, open(recordedLocation(id)));
  const left =
    doubt === null
      ? []
      : added.map((id): Column => ({ id, folder: null, problem: doubt, left: true }));
  const prefix = o.prefix ?? (folder?.snapshots.length ? folder.prefix : null);
  const opened = await Promise.all(
    [...asked].map(async ([id, { location, opening }]) => {
      const known = remembered.get(id);
      const column = await withKnown(location, await opening, known, { ...o, prefix });
      const isOptional = o.mayBeAway?.has(id) || (o.mayBeAway !== undefined && known?.optional);
      return isOptional && column.error instanceof Absent ? asAway(column, report) : column;
    }),
  );
  return [source, ...opened.map((column) => tellProblem(column, o, report)), ...left];
}

/** By location, what the records of a SOURCE say of its destinations, whatever the prefix. */
function knownTo(folder: Folder): [string, KnownDestination][] {
  if (!isSnapshotFolder(folder)) return [];
  const prefixes = [...prefixesIn(folder.standing), ...folder.record.chains.keys()];
  return [...new Set(prefixes)]
    .flatMap((prefix) => knownDestinations(withPrefix(folder, prefix)))
    .map((known) => [known.location, known]);
}

/** Why the destinations in a folder's records are not opened; null where they are. */
function doubtOf(folder: Folder): string | null {
  for (const chain of [...folder.record.chains.values(), folder.chain]) {
    const doubt = whyNotBelieved({ ...folder, chain });
    if (doubt !== null) return doubt;
  }
  return null;
}

/** Opens a location only to look. That this fails is a failure of the command, but not its end. */
async function openColumn(location: Location, o: LookOptions): Promise<OpenedColumn> {
  const { id } = location;
  try {
    if (!isReadable(location)) return { id, folder: null, problem: null };
    const folder = await openLocation(location, { ...o, wait: "look" });
    if (folder.place.filesystem === null && folder.store === null)
      throw new Absent("not on btrfs (is the disk mounted?)");
    return { id, folder, problem: null };
  } catch (error) {
    return { id, folder: null, problem: (error as Error).message, error: error as Error };
  }
}

/** A destination that is not there, and need not be. */
function asAway({ id, problem }: OpenedColumn, report: Report): OpenedColumn {
  log.debug(`${id}: ${problem}`);
  report.event("skipped", { destination: id, message: problem });
  return { id, folder: null, problem, away: true };
}

/** Tells what is wrong with a place, and goes on without it. Errors: UsageError, Interrupted. */
function tellProblem(
  { error, ...column }: OpenedColumn,
  { apart }: Looking,
  report: Report,
): Column {
  if (error instanceof Interrupted || (error instanceof UsageError && !apart)) throw error;
  if (error !== undefined) report.error(column.id, error);
  return column;
}

/**
 * A place that was opened before the prefix was known. `known`: what SOURCE's record says of it,
 * and so of the filesystem that was there.
 */
async function withKnown(
  location: Location,
  early: OpenedColumn,
  known: KnownDestination | undefined,
  o: LookOptions,
): Promise<OpenedColumn> {
  const { id, folder } = early;
  if (folder === null) return early;
  if (known?.filesystem && known.filesystem !== folder.place.filesystem) {
    const error = new Absent("another filesystem than before is there (is the disk mounted?)");
    return { id, folder: null, problem: error.message, error };
  }
  if (o.prefix === null) return openColumn(location, o);
  return { ...early, folder: underPrefix(folder, o.prefix) };
}

const underPrefix = (folder: Folder, prefix: string) =>
  folder.prefix === prefix ? folder : withPrefix(folder, prefix);

/**
 * How large one is: the bytes of its stream, or that it references; and how many bytes would be free
 * without it, where quotas tell.
 */
export type Size = { readonly bytes: number; readonly frees: number | null };

/** The sizes of the whole snapshots of a folder, by UUID. Errors: Failure. */
async function sizesIn(folder: Folder): Promise<[string, Size][]> {
  if (folder.store !== null)
    return folder.store.streams.map(({ uuid, bytes }) => [uuid, { bytes, frees: null }]);
  const whole = wholeIn(folder);
  const counted = await quotasIn(folder);
  if (whole.every(({ id }) => counted.has(id)))
    return whole.map(({ uuid, id }) => [uuid, counted.get(id) as Size]);
  const texts: string[] = [];
  for (const names of inArguments(whole.map(({ name }) => `./${name}`)))
    texts.push(
      await ask(folder.host, SIZES, { ...at(folder), names }, `${folder.id}: cannot tell sizes`),
    );
  const text = texts.join("\n");
  const lines = text.split("\n").map((line) => /^\s*(\d+)\s.*?\s\.\/(.*)$/.exec(line));
  const found = new Map(
    lines.filter((match) => match !== null).map(([, size, name]) => [name, Number(size)]),
  );
  return whole.map(({ uuid, name }) => {
    const bytes = found.get(name);
    if (bytes === undefined)
      throw new Failure(
        `"btrfs filesystem du" did not tell the size of ${name}: ${text.slice(0, 200)}`,
      );
    return [uuid, { bytes, frees: null }];
  });
}

/** What quotas tell of subvolumes, by their IDs; nothing where they are off, or cannot be asked. */
async function quotasIn(folder: Folder): Promise<Map<number, Size>> {
  const { filesystem } = folder.place;
  if (folder.alone || filesystem === null) return new Map();
  const given = { ...at(folder), filesystem };
  const problem = `${folder.id}: cannot ask quotas`;
  const told = await ask(folder.host, QUOTAS, given, problem).catch((error: Error) => {
    checkInterruption();
    log.debug(error.message);
    return "";
  });
  return countedIn(told);
}

/** Reads what `btrfs qgroup show --raw` prints of single subvolumes, by their IDs. */
export const countedIn = (text: string): Map<number, Size> =>
  new Map(
    [...text.matchAll(/^0\/(\d+)\s+(\d+)\s+(\d+)\b/gm)].map(([, id, bytes, frees]) => [
      Number(id),
      { bytes: Number(bytes), frees: Number(frees) },
    ]),
  );

/** What an inventory is about. `source`: the first column's folder, if it is a SOURCE's. */
type Inventory = {
  readonly source: Folder | null;
  /** What the source has, and the destinations that it knows. */
  readonly taken: readonly Snapshot[];
  readonly known: readonly KnownDestination[];
  readonly policies: Pick<ListOptions, "sourcePolicy" | "backupPolicy">;
  readonly now: number;
};

/**
 * What `list` shows: for each snapshot, newest first, a mark for each location; null where that has
 * nothing.
 */
export function inventory(
  columns: readonly Column[],
  policies: Inventory["policies"],
  now: number,
  sizes: ReadonlyMap<string, Size>,
) {
  const folders = columns.map(({ folder }) => folder);
  const [first] = folders;
  const source = first && isSnapshotFolder(first) ? first : null;
  const [taken, known] = source === null ? [[], []] : [wholeIn(source), knownDestinations(source)];
  const sides = columns.map((one) => sideOf(one, { source, taken, known, policies, now }));
  const rows = align(folders);
  const snapshots = rows.toReversed().map(({ name, time, cells }) => ({
    name,
    time: new Date(time).toISOString().slice(0, 19),
    ...describedBy(source, cells[0]),
    at: sides.map(({ folder, goes, pin }, i) => {
      // What cannot be asked: what the source remembers.
      if (folder === null)
        return {
          state: "?",
          pin: cells[0]?.entry.uuid === pin,
          goes: false,
          uuid: null,
          bytes: null,
          frees: null,
        };
      const { state, entry } = cells[i] ?? {};
      if (entry === undefined) return null;
      const { uuid, kept } = entry;
      return {
        state,
        pin: uuid === pin,
        goes: goes.has(uuid),
        uuid,
        ...(sizes.get(uuid) ?? { bytes: null, frees: null }),
        ...(kept === undefined ? {} : { kept }),
      };
    }),
  }));
  const wholeAt = (i: number) =>
    rows.flatMap(({ cells }) => (cells[i]?.state === "whole" ? cells[i].entry : []));
  const locations = columns.map(({ id, folder, problem, away }, i) => ({
    id,
    source: folder !== null && folder === source,
    error: problem,
    last: known.find(({ location }) => location === id)?.last,
    ...(away ? { optional: true } : {}),
    ...totalsOf(folder, wholeAt(i), sizes),
  }));
  return { locations, snapshots };
}

/** What a place has in all of one prefix. */
export type Totals = {
  /** Bytes of its filesystem; null where nobody tells. */
  readonly free: number | null;
  readonly size: number | null;
  /** The whole ones, with the names of the first and the last. */
  readonly count: number | null;
  readonly oldest: string | null;
  readonly newest: string | null;
  /** The longest time between two that follow one another, in ms; null for less than two. */
  readonly longest_gap: number | null;
  /** The bytes of all streams; or the sum of what each references, where that was asked for. */
  readonly bytes: number | null;
};

/** What a folder has in all, by what is whole there; `sizes`: as far as they were asked for. */
function totalsOf(
  folder: Folder | null,
  found: readonly Snapshot[],
  sizes: ReadonlyMap<string, Size>,
): Totals {
  if (folder === null) return NO_TOTALS;
  const { place, store, prefix } = folder;
  const whole = found.toSorted((a, b) => a.moment - b.moment);
  const gaps = whole.slice(1).map(({ moment }, i) => moment - (whole[i]?.moment ?? 0));
  const stored = store?.streams.filter(({ name }) => parseName(name, prefix) !== null);
  const known = stored ?? whole.flatMap(({ uuid }) => sizes.get(uuid) ?? []);
  const isKnown = Number.isFinite(place.free);
  return {
    free: isKnown ? place.free : null,
    size: Number.isFinite(place.size) ? place.size : null,
    count: whole.length,
    oldest: whole[0]?.name ?? null,
    newest: whole.at(-1)?.name ?? null,
    longest_gap: gaps.length === 0 ? null : gaps.reduce((a, b) => Math.max(a, b), 0),
    bytes: stored === undefined && known.length === 0 ? null : bytesOf(known),
  };
}

const NO_TOTALS: Totals = {
  free: null,
  size: null,
  count: null,
  oldest: null,
  newest: null,
  longest_gap: null,
  bytes: null,
};

/** What its maker said of a snapshot that was taken over, where the source's record tells. */
function describedBy(source: Folder | null, cell: Cell | undefined): { description?: string } {
  const told = source?.chain.imported?.[cell?.entry.uuid ?? ""]?.words;
  return told === undefined ? {} : { description: told };
}

/** The UUIDs of what goes in a column by the policies, and of the pin. */
function sideOf({ folder, id }: Column, all: Inventory) {
  const { source, taken, known, policies, now } = all;
  const going = (decisions: readonly Decision<Snapshot>[]) =>
    new Set(decisions.flatMap(({ reasons, entry }) => (reasons.length === 0 ? entry.uuid : [])));
  if (folder === null) {
    const remembered = known.find(({ location }) => location === id);
    return { folder, goes: new Set<string>(), pin: remembered?.pin?.uuid ?? null };
  }
  if (folder === source) {
    const claimants = known.map(({ location, pin }) => ({
      id: location,
      pin,
      unread: false,
      unsentPolicy: null,
    }));
    const decisions = planSource(taken, claimants, {
      policy: policies.sourcePolicy,
      now,
      adopted: folder.chain.leaps,
    });
    return { folder, goes: going(decisions), pin: null };
  }
  const standing =
    folder.store !== null
      ? standingInStore(folder.store, folder.prefix, lineagesIn(folder.store, all))
      : standingIn(folder, folder.chain, []);
  const pinned = newestShared(taken, standing.held);
  const leaps = source?.chain.leaps ?? folder.chain.leaps;
  const decisions = isSnapshotFolder(folder)
    ? []
    : planDestination(taken, standing, { policy: policies.backupPolicy, now, adopted: leaps });
  return {
    folder,
    goes: going(decisions),
    pin: pinned && (dataFinder(standing.held)(pinned)?.uuid ?? null),
  };
}

/** The lineages of streams that are the source's own; without a source, all. */
function lineagesIn({ streams }: Store, { source, taken }: Inventory): Set<string> {
  if (source === null) return new Set(streams.map(({ owner }) => owner.lineage));
  const owner = ownerOf({ uuid: source.source?.uuid ?? "", host: "", path: "" });
  return lineagesOf(streams, owner, taken);
}

type Inventoried = ReturnType<typeof inventory>;

/** The rows of a table, the newest last, and below them what the columns are; of `all` rows. */
function inventoryTable(
  columns: readonly Column[],
  { locations, snapshots }: Inventoried,
  now: number,
  all: number,
): string {
  const letters = locations.map((_, i) => columnLetter(i));
  const isDescribed = snapshots.some(({ description }) => description !== undefined);
  const cells = snapshots
    .toReversed()
    .map(({ name, time, at: marks, description = "" }) => [
      name,
      inWords(now - Date.parse(`${time}Z`)),
      ...marks.map(markText),
      ...(isDescribed ? [description] : []),
    ]);
  const head = ["NAME", "AGE", ...letters, ...(isDescribed ? ["DESCRIPTION"] : [])];
  const rows = cells.length === 0 ? "no snapshots\n" : alignedTable([head, ...cells]);
  const older = all > cells.length ? `… ${all - cells.length} older\n` : "";
  const isFreeing = snapshots.some((one) => one.at.some((mark) => (mark?.frees ?? null) !== null));
  const note = isFreeing ? "(…): what would be free if only that one were deleted\n" : "";
  return `${older}${rows}\n${totalsTable(locations)}\n${legendOf(columns, locations)}${note}\n`;
}

/** What a place has of a snapshot. */
function markText(mark: Inventoried["snapshots"][number]["at"][number]): string {
  if (mark === null) return "-";
  const { state, pin, goes, bytes, frees } = mark;
  const kept = "kept" in mark ? mark.kept : undefined;
  const note = kept === undefined ? "" : `, kept${kept === "" ? "" : ` (${kept})`}`;
  const size = bytes === null ? "" : ` ${inBytes(bytes)}`;
  return `${state}${pin ? ", pin" : ""}${note}${goes ? ", goes" : ""}${size}${frees === null ? "" : ` (${inBytes(frees)})`}`;
}

/** A line for each place: how many, from when to when, and the space there. */
function totalsTable(locations: Inventoried["locations"]): string {
  const isMeasured = locations.some(({ bytes }) => bytes !== null);
  const rows = locations.map(({ count, oldest, newest, longest_gap, bytes, free, size }, i) => [
    columnLetter(i),
    count === null ? "?" : String(count),
    dateIn(oldest),
    dateIn(newest),
    longest_gap === null ? "-" : inWords(longest_gap),
    ...(isMeasured ? [bytes === null ? "-" : inBytes(bytes)] : []),
    [free, size].flatMap((one) => (one === null ? [] : [inBytes(one)])).join(" of ") || "-",
  ]);
  const head = ["", "ALL", "FROM", "TO", "LONGEST GAP", ...(isMeasured ? ["BYTES"] : []), "FREE"];
  return alignedTable([head, ...rows]);
}

/** The time in a name, which its prefix can make long. */
const dateIn = (name: string | null) =>
  name === null ? "-" : name.slice(-"20260101-000000".length);

function legendOf(columns: readonly Column[], locations: Inventoried["locations"]): string {
  const lines = locations.map(({ id, last, source }, i) => {
    const ago = last && `${inWords(Date.now() - Date.parse(last))} ago`;
    const reached = source || last === undefined ? "" : `, last served ${ago ?? "never"}`;
    return `${columnLetter(i)}  ${id}${source ? " (source)" : ""}${reached}${whyEmpty(columns[i] as Column)}\n`;
  });
  return lines.join("");
}

// ── list: whether the newest of each chain is young enough ──

type AgeOptions = ListOptions & { readonly maxAge: NonNullable<ListOptions["maxAge"]> };

/** A chain in a place, as --max-age judges it. */
type Aged = Column & {
  readonly prefix: string;
  /** What a source that can be believed remembers of it. */
  readonly known: KnownDestination | undefined;
  /** Since when nothing has changed, as runs have found. */
  readonly notes: readonly Unchanged[];
};

/** For a monitoring system, a line for each chain, whatever becomes of the others. */
async function listAges(o: AgeOptions, report: Report): Promise<void> {
  const error: Report["error"] = (_, problem) => {
    // What cannot be read is told in the one line of its own.
    if (problem instanceof Interrupted) throw problem;
  };
  const looking = { ...o, prefix: o.prefix ?? "", mayBeAway: o.optional, apart: true };
  const columns = await openColumns(o.locations, false, looking, { ...report, error });
  const places = await withMembers(columns, o, report);
  for (const one of places.flatMap((place) => chainsOf(place, places, o.prefix)))
    tellAge(one, o, report);
}

/** The chains of a place, with what the sources among all places know of them. */
function chainsOf(place: Column, all: readonly Column[], prefix: string | null): Aged[] {
  const standing = prefixesIn(place.folder?.standing ?? []);
  const found = standing.length === 0 ? [""] : standing;
  return (prefix === null ? found : [prefix]).map((one) => {
    const sources = all.flatMap(({ folder }) => {
      const source = folder !== null && isSnapshotFolder(folder) && underPrefix(folder, one);
      return source && whyNotBelieved(source) === null ? [source] : [];
    });
    const folder = place.folder && underPrefix(place.folder, one);
    const known = sources.flatMap(knownDestinations).find(({ location }) => location === place.id);
    const chains = [...sources, ...(folder === null ? [] : [folder])].map(({ chain }) => chain);
    const notes = chains.flatMap(({ unchanged }) => unchanged ?? []);
    return { ...place, folder, prefix: one, known, notes };
  });
}

/** A chain's newest backup, and until when nothing had changed since, in ms since 1970. */
type Newest = { readonly name: string; readonly moment: number; readonly same: number | null };

/** The newest complete backup of a chain; where nobody can look, the one that the source remembers. */
function newestOf(
  { folder, prefix, problem, away, known, notes }: Aged,
  now: number,
): Newest | null {
  const pin = folder === null && (problem === null || away) ? known?.pin : null;
  const time = pin ? parseName(pin.name, prefix) : null;
  const remembered =
    pin && time !== null ? [{ name: pin.name, uuid: pin.uuid, moment: momentOf(time) }] : [];
  const standing = folder === null ? [] : wholeIn(folder);
  // What is dated in the future (more than time zones differ) would be young for ever.
  const isPast = (moment: number) => moment < now + DURATION.d;
  const [newest] = [
    ...remembered,
    ...standing.map((one) => ({ name: one.name, uuid: dataOf(one), moment: one.moment })),
  ]
    .filter(({ moment }) => isPast(moment))
    .sort((a, b) => b.moment - a.moment);
  if (newest === undefined) return null;
  const same = notes
    .filter(({ uuid }) => uuid === newest.uuid)
    .map(({ at: when }) => Date.parse(when))
    .filter((moment) => isPast(moment) && moment > newest.moment);
  return { ...newest, same: same.length === 0 ? null : Math.max(...same) };
}

/** When a chain was as its source, in ms since 1970. One that may be away is judged as a run does. */
const momentOfAged = ({ away, known }: Aged, newest: Newest | null): number =>
  away ? Date.parse(known?.last ?? "") : (newest?.same ?? newest?.moment ?? NaN);

/** Tells whether a chain's newest backup is young enough. */
function tellAge(one: Aged, o: AgeOptions, report: Report): void {
  const { id, prefix, problem, away } = one;
  const { count, unit, text } = o.maxAge;
  const now = Date.now();
  const newest = newestOf(one, now);
  const ok = momentOfAged(one, newest) >= momentBefore(now, count, unit);
  if (!ok) report.failed = true;
  const error = one.folder === null && newest === null ? (problem ?? UNASKED) : problem;
  report.event("age", {
    location: id,
    prefix,
    ok,
    newest: newest?.name ?? null,
    unchanged: newest?.same ? new Date(newest.same).toISOString() : null,
    error,
    ...(away ? { optional: true } : {}),
  });
  const failed = error === null || away ? "TOO OLD" : "UNKNOWN";
  if (!o.json)
    print(`${ok ? "OK" : failed}: ${id}: ${ageText(one, newest, now)} (at most ${text})\n`);
}

const UNASKED = "a command cannot be asked what it has, and no run is known to have served it";

/** What is told of a chain's age. */
function ageText(
  { folder, prefix, problem, away, known }: Aged,
  newest: Newest | null,
  now: number,
) {
  const { last = null } = known ?? {};
  const ago = (moment: number) => `${inWords(now - moment)} ago`;
  if (away) return `not there; last served ${last === null ? "never" : ago(Date.parse(last))}`;
  if (newest === null) {
    if (folder === null) return problem ?? UNASKED;
    return `no complete backup${prefix === "" ? "" : ` with the prefix ${JSON.stringify(prefix)}`}`;
  }
  const age = `the newest backup is ${newest.name}, ${inWords(now - newest.moment)} old`;
  return newest.same === null ? age : `${age}, and nothing had changed ${ago(newest.same)}`;
}

// ── list: what a tree has ──

/** What `list` tells of a subvolume of a tree, in one place. */
export type MemberLine = {
  readonly path: string;
  readonly count: number;
  readonly oldest: string | null;
  readonly newest: string | null;
  /** The run from which on it was not there any more. */
  readonly gone: string | null;
  /** The names of what can be restored of it, oldest first. */
  readonly snapshots: readonly string[];
};

/** The lines of a tree's members, by their paths. `whole`: what can be restored of each. */
export function memberLines(
  whole: ReadonlyMap<string, readonly Pick<Snapshot, "name">[]>,
  gone: Readonly<Record<string, string>>,
): MemberLine[] {
  const lost = Object.keys(gone).filter((path) => !whole.has(path));
  const all = [...whole, ...lost.map((path) => [path, []] as const)];
  return all
    .map(([path, some]) => {
      const snapshots = some.map(({ name }) => name);
      return {
        path,
        count: snapshots.length,
        oldest: snapshots[0] ?? null,
        newest: snapshots.at(-1) ?? null,
        gone: goneSince(gone, path) ?? null,
        snapshots,
      };
    })
    .sort((a, b) => (a.path < b.path ? -1 : 1));
}

/** The members' lines as people read them. */
function membersTable(lines: readonly MemberLine[], prefix: string, now: number): string {
  const rows = lines.map(({ path, count, oldest, newest, gone }) => [
    path,
    String(count),
    oldest ?? "-",
    newest ?? "-",
    newest === null ? "-" : inWords(now - (parseName(newest, prefix) ?? now)),
    gone === null ? "" : `gone since ${gone}`,
  ]);
  const head = ["SUBVOLUME", "COUNT", "OLDEST", "NEWEST", "AGE", ""];
  return rows.length === 0 ? "no subvolumes\n" : alignedTable([head, ...rows]);
}

/** A column's trees: of its prefix, or of all; none where they cannot be read, which is told. */
async function treesIn(
  { id, folder }: Column,
  o: TreeOptions,
  prefix: string | null,
  report: Report,
): Promise<Tree[]> {
  const location = folder && columnLocation(id, o);
  if (folder === null || location === null || !hasTrees(folder, o)) return [];
  try {
    const trees: Tree[] = [];
    for (const one of prefix === null ? await treePrefixes(folder, location) : [prefix]) {
      const root = underPrefix(folder, one);
      if (o.recursive || root.chain.tree !== undefined)
        trees.push(await openTree(root, location, o));
    }
    return trees;
  } catch (error) {
    report.error(id, error);
    return [];
  }
}

/** Whether a place is, or is said to be, the root of a tree. Without root, nobody sees what is below. */
const hasTrees = (folder: Folder, { recursive }: TreeOptions) =>
  recursive || (!folder.alone && [...folder.record.chains.values()].some(({ tree }) => tree));

/** The prefixes that a column is listed for. */
async function prefixesToList(
  { id, folder }: Column,
  o: TreeOptions,
  report: Report,
): Promise<string[]> {
  const standing = prefixesIn(folder?.standing ?? []);
  const location = folder && columnLocation(id, o);
  if (folder === null || location === null || !hasTrees(folder, o)) return standing;
  const below = await treePrefixes(folder, location).catch((error: Error) => {
    report.error(id, error);
    return [];
  });
  return [...new Set([...standing, ...below])].sort();
}

type TreeOptions = Pick<ListOptions, "hosts" | "locations" | "recursive">;

/** The location of a column, as it was given, or as a source's record has it; null for a command. */
function columnLocation(id: string, { locations }: TreeOptions): Readable | null {
  const location = locations.find((one) => one.id === id) ?? recordedLocation(id);
  return isReadable(location) ? location : null;
}

/** Shows the members of trees, place by place. */
async function listTrees(
  columns: readonly Column[],
  o: ListOptions,
  prefix: string,
  report: Report,
): Promise<void> {
  for (const [i, column] of columns.entries()) {
    const [tree] = await treesIn(column, o, prefix, report);
    if (tree === undefined) continue;
    const whole = new Map([...tree.members].map(([path, folder]) => [path, wholeIn(folder)]));
    const members = memberLines(whole, tree.root.chain.tree?.gone ?? {});
    report.event("tree", { prefix, location: column.id, members });
    if (o.json) continue;
    const now = wallClock(new Date());
    print(`${columnLetter(i)}  below ${column.id}\n\n${membersTable(members, prefix, now)}\n`);
  }
}

/** Columns, and behind each one the members of its tree that are not gone, or why there are none. */
async function withMembers(
  columns: readonly Column[],
  o: ListOptions,
  report: Report,
): Promise<Column[]> {
  const all: Column[] = [];
  for (const column of columns) {
    const wrong: Column[] = [];
    const error: Report["error"] = (id, problem) => {
      if (problem instanceof Interrupted) throw problem;
      wrong.push({ id: `below ${id}`, folder: null, problem: messageOf(problem) });
    };
    const trees = await treesIn(column, o, o.prefix, { ...report, error });
    const below = trees.flatMap(({ root, members }) =>
      [...members].flatMap(([path, folder]): Column[] =>
        goneSince(root.chain.tree?.gone ?? {}, path) === undefined
          ? [{ id: folder.id, folder, problem: null }]
          : [],
      ),
    );
    // Where the root was a plain directory, only what is below counts.
    const isPlain = below.length > 0 && prefixesIn(column.folder?.standing ?? []).length === 0;
    all.push(...(isPlain ? [] : [column]), ...below, ...wrong);
  }
  return all;
}

// ── verify: every byte, read and compared ──

export type VerifyOptions = ReturnType<typeof verifyOptions>;
/** A verify that is under way. `tell` tells of each one. */
type Verify = VerifyOptions & {
  readonly progress: Verification;
  readonly tell: (line: string) => void;
};

/** Reads every byte of what two locations share, on their hosts, and compares. */
export async function verify(given: VerifyOptions, report: Report): Promise<void> {
  const isMany = given.all || given.locations.some(holdsStreams);
  const tell = given.each || !isMany ? log.info : log.debug;
  const o: Verify = { ...given, progress: new Verification(Date.now()), tell };
  const columns = await openColumns(o.locations, false, o, report);
  let compared = 0;
  await whileTold(o, isMany && given.shown, async () => {
    for (const some of o.recursive ? await columnsByMember(columns, o, report) : [columns])
      compared += await verifyColumns(some, o, report);
  });
  const empty = columns.filter(({ folder }) => folder?.snapshots.length === 0);
  const why = empty.map((one) => `; ${one.id} has no snapshots${whyEmpty(one)}`).join("");
  if (compared === 0) tellFailure(report, null, `nothing was compared${why}`);
  else log.info(o.progress.summary(Date.now()));
  const { well, all, bytes } = o.progress;
  report.event("summary", { ok: !report.failed, compared, well, of: all, bytes });
}

/** How far a verify is; moments are in ms since 1970. */
export class Verification {
  /** How many are right, of all that were to be read so far; and the bytes that were read. */
  well = 0;
  all = 0;
  bytes = 0;
  #place = { id: "", all: 0, done: 0, bytes: 0, size: 0, began: 0 };
  /** Of the one at hand. */
  #now = 0;
  #told: number;
  /** Is called when a place begins. */
  begun = () => {};
  constructor(readonly began: number) {
    this.#told = began;
  }
  /** So many are read in a place, next; `size`: of so many bytes, 0 where nobody knows. */
  begin(id: string, all: number, size: number, began: number): void {
    this.#place = { id, all, done: 0, bytes: 0, size, began };
    this.all += all;
    this.begun();
  }
  /** So many bytes of one have been read. */
  reading(bytes: number): void {
    this.#now = bytes;
  }
  /** One has been read, or could not be. */
  done(isWell: boolean, bytes: number): void {
    if (isWell) this.well++;
    this.#place.done++;
    this.#place.bytes += bytes;
    this.bytes += bytes;
    this.#now = 0;
  }
  /** The line at the bottom of a terminal. */
  line(columns: number, now: number): string {
    const { id, all, done, bytes, size, began } = this.#place;
    return progressLine({
      name: `${done} of ${all} in ${id}`,
      bytes: bytes + this.#now,
      size: size === 0 ? undefined : size,
      seconds: (now - began) / 1000,
      columns,
    });
  }
  /** A line for a log, if it is time for one. */
  news(now: number): string | null {
    if (now - this.#told < NEWS) return null;
    this.#told = now;
    const { id, all, done, bytes, size } = this.#place;
    const read = bytes + this.#now;
    const part = size === 0 ? "" : ` of ${inBytes(size)}`;
    return `Read ${done} of ${all} in ${id}, ${inBytes(read)}${part} in ${inWords(now - this.began)}`;
  }
  /** The last line. */
  summary(now: number): string {
    const amount = this.bytes === 0 ? "" : `${inBytes(this.bytes)} `;
    return `${this.well} of ${this.all} ${this.all === 1 ? "is" : "are"} well, ${amount}in ${inWords(now - this.began)}`;
  }
}

/** Shows how far a verify is while it works: on a terminal, else in the log now and then. */
async function whileTold(
  { progress }: Verify,
  isShown: boolean,
  work: () => Promise<void>,
): Promise<void> {
  const isDrawn = displayOf({ progress: isShown, btrfsDebug: false }).progress;
  const show = () => {
    const now = Date.now();
    if (isDrawn) return terminal.show(progress, progress.line(process.stderr.columns || 80, now));
    const news = progress.news(now);
    if (news !== null) log.info(news);
  };
  const watch = isShown ? setInterval(show, 500) : undefined;
  if (isDrawn) progress.begun = show;
  try {
    await work();
  } finally {
    clearInterval(watch);
    if (isDrawn) terminal.show(progress, null);
  }
}

/** Compares the columns of one chain. Returns how many snapshots or streams were read. */
async function verifyColumns(
  columns: readonly Column[],
  o: Verify,
  report: Report,
): Promise<number> {
  let compared = 0;
  for (const { folder } of columns)
    if (folder?.store) compared += await verifyStreams(folder, folder.store, o, report);
  const [left, ...others] = columns.map(({ folder }) => folder).filter((one) => !one?.store);
  if (!left) return compared;
  const comparison = { o, report, left, digests: new Map(), equal: new Map(), compared };
  for (const right of others) if (right !== null) await compareShared(comparison, right);
  await rememberEqual(comparison).catch((problem: Error) =>
    log.warn(`the next run may compare once more: ${problem.message}`),
  );
  return comparison.compared;
}

/**
 * The columns of each subvolume of a tree, the root's first. A member that SOURCE does not have (any
 * more) is not compared; one that a place lacks is an error there.
 */
async function columnsByMember(
  columns: readonly Column[],
  o: VerifyOptions,
  report: Report,
): Promise<Column[][]> {
  const trees: (Tree | null)[] = [];
  for (const column of columns) {
    const [tree = null] = await treesIn(column, o, column.folder?.prefix ?? null, report);
    trees.push(tree);
  }
  const first = trees.find((tree, i) => tree !== null && columns[i]?.folder?.store === null);
  const paths = [...((first ?? trees.find((tree) => tree !== null))?.members.keys() ?? [])];
  const inStores = trees.flatMap((tree) => (tree?.root.store ? [...tree.members.keys()] : []));
  const below = [...new Set([...paths, ...inStores])].map((path) =>
    columns.flatMap(({ id, problem }, i): Column[] => {
      const tree = trees[i] ?? null;
      const folder = tree?.members.get(path) ?? null;
      if (folder !== null) return [{ id: folder.id, folder, problem }];
      if (tree !== null && paths.includes(path))
        tellFailure(report, id, `nothing of the subvolume ${path} is there`);
      return [];
    }),
  );
  const isAsked = ({ folder }: Column) =>
    o.snapshot === null || folder?.standing.some(({ name }) => name === o.snapshot);
  const asked = below.filter((some) => some.some(isAsked));
  const isEmpty = (column: Column) => column.folder?.snapshots.length === 0;
  return columns.every(isEmpty) ? asked : [[...columns], ...asked];
}

/** What was found in comparing the snapshots of a folder, `left`, with those of others. */
type Comparison = {
  readonly o: Verify;
  readonly report: Report;
  readonly left: Folder;
  /** By UUID, what was read of `left`. */
  readonly digests: Map<string, Promise<Summed>>;
  /** By location, the snapshots of `left` that are the same there. */
  readonly equal: Map<string, Snapshot[]>;
  compared: number;
};

async function compareShared(comparison: Comparison, right: Folder): Promise<void> {
  const { o, report, left } = comparison;
  const { id } = right;
  if (samePlace(left, right)) return tellFailure(report, id, `it is the same folder as ${left.id}`);
  const rows = align([left, right]);
  for (const { name, cells } of o.all ? rows : [])
    if (!cells.includes(undefined) && cells.some((cell) => cell?.state !== "whole"))
      report.warning(
        `${name} in ${id} is not compared: it is incomplete or foreign there, or has other data`,
      );
  const shared = rows.filter(({ cells }) => cells.every((cell) => cell?.state === "whole"));
  const wanted =
    o.snapshot === null
      ? shared.slice(o.all ? 0 : -1)
      : shared.filter(({ name }) => name === o.snapshot);
  if (wanted.length === 0)
    tellFailure(
      report,
      id,
      o.snapshot === null
        ? `nothing complete is shared with ${left.id}`
        : `${o.snapshot} is not complete on both sides, or not the same snapshot`,
    );
  o.progress.begin(id, wanted.length, 0, Date.now());
  for (const row of wanted)
    await compareOne(comparison, right, row).catch((error) => {
      o.progress.done(false, 0);
      report.error(id, error);
    });
}

async function compareOne(
  comparison: Comparison,
  right: Folder,
  { name, cells }: Row,
): Promise<void> {
  const { o, report, left, digests, equal } = comparison;
  const { id } = right;
  const [ours, theirs] = cells.map((cell) => cell?.entry) as [Snapshot, Snapshot];
  o.tell(`Reading ${name} in ${left.id} and ${id}`);
  const known = digests.get(ours.uuid);
  const digest = known ?? digestIn(left, ours);
  digests.set(ours.uuid, digest);
  const [own, other] = (await allOf([digest, digestIn(right, theirs)])) as [Summed, Summed];
  const [a, b] = [own.sum, other.sum];
  const differences = a === b ? [] : await differencesBetween([left, ours], [right, theirs]);
  comparison.compared++;
  o.progress.done(a === b, other.bytes + (known === undefined ? own.bytes : 0));
  report.event("verify", { location: id, name, equal: a === b, sha256: b, differences });
  if (a !== b)
    return tellFailure(
      report,
      id,
      `${name} differs from ${left.id}: ${firstFew(differences, 10, "; ")}`,
    );
  equal.set(id, [...(equal.get(id) ?? []), ours]);
  o.tell(`${name} in ${id} is equal (SHA-256 ${b})`);
}

/** The first few of some words, and how many more there are. */
const firstFew = (words: readonly string[], most: number, between: string) =>
  [
    ...words.slice(0, most),
    ...(words.length > most ? [`and ${words.length - most} more`] : []),
  ].join(between);

/**
 * Writes into a source's record which of its snapshots were changed since they were taken, and are
 * all the same what their backups are. Errors: Failure, Busy.
 */
async function rememberEqual({ o, left: source, equal }: Comparison): Promise<void> {
  const isKnown = ({ chain }: Folder) =>
    (chain.destinations ?? []).some(({ location }) => equal.has(location));
  const inquiry = inquiryInto(source);
  const asked = [...equal.values()]
    .flat()
    .filter((one) => changedSince(one, inquiry, {}) === undefined);
  if (!isKnown(source) || asked.length === 0 || source.record.unreadable !== null) return;
  await learnOfParents(inquiry, asked, []);
  const isChanged = (one: Snapshot) => changedSince(one, inquiry, {});
  if (!asked.some(isChanged)) return;
  const folder = await openFolder(o.locations[0] as Readable, source.path, {
    prefix: source.prefix,
    wait: 0,
    hosts: o.hosts,
  });
  try {
    const destinations = (folder.chain.destinations ?? []).map((known) => {
      const changed = (equal.get(known.location) ?? []).filter(isChanged);
      const generations = changed.map(({ uuid }) => [uuid, inquiry.ctransids.get(uuid) ?? 0]);
      const cleared = { ...known.cleared, ...Object.fromEntries(generations) };
      return { ...known, ...clearedOf(folder.standing, cleared) };
    });
    if (isKnown(folder) && !sameRecord(folder.chain, { ...folder.chain, destinations }))
      await writeRecord(folder, { ...folder.chain, destinations });
  } finally {
    await whileCleaning(folder.close);
  }
}

/** Compares every stored stream with its checksum object. Returns how many have one. */
async function verifyStreams(
  folder: Folder,
  store: Store,
  o: Verify,
  report: Report,
): Promise<number> {
  const { id } = folder;
  const all = byUuid(store.streams);
  const bad = new Set<Stream>();
  const failed = (lacking: Stream, what: string) => {
    bad.add(lacking);
    const lost = store.streams
      .filter((other) => other.readonly && chainOf(other, all).includes(lacking))
      .map(({ name }) => name);
    const hint = lost.length > 0 ? `; not to be restored: ${firstFew(lost, 5, ", ")}` : "";
    tellFailure(report, id, `${lacking.uuid} ${what}${hint}`);
  };
  const streams = streamsToVerify(store, all, o);
  if (streams.length === 0)
    tellFailure(
      report,
      id,
      o.snapshot === null ? "there are no streams" : `there is no stream of ${o.snapshot}`,
    );
  for (const one of streams.filter(({ stored, readonly }) => stored && !readonly))
    failed(one, `cannot be restored: ${missingFor(one, folder)}`);
  for (const one of streams.filter(({ summed }) => !summed))
    if (one.stored || store.unsummed.includes(one)) failed(one, "has no checksum object");
  for (const object of [...store.debris.values()].flat())
    report.warning(`${id}: ${object} is what a broken transfer left; the next run removes it`);
  const readable = streams.filter(({ summed }) => summed);
  o.progress.begin(id, streams.length, bytesOf(readable), Date.now());
  for (let i = readable.length; i < streams.length; i++) o.progress.done(false, 0);
  const sums = await readSums(folder, store, readable);
  const small = await readSmall(folder, store.verbs, readable);
  for (const one of readable) {
    const { name, uuid } = one;
    o.tell(`Reading ${name} in ${id}`);
    const counts = (bytes: number | null) => o.progress.reading(bytes ?? 0);
    const read = small.get(one) ?? (await readStream(folder, store.verbs, one, counts));
    const right = sums.get(uuid);
    if (!("problem" in read)) {
      const equal = read.sha256 === right;
      const differences = equal ? [] : [uuid];
      report.event("verify", { location: id, name, equal, sha256: read.sha256, differences });
    }
    const wrong = wrongIn(read, right);
    if (wrong !== null) failed(one, wrong);
    else o.tell(`${name} in ${id} is as it was stored (SHA-256 ${right})`);
    o.progress.done(!bad.has(one), one.bytes);
  }
  return readable.length;
}

/** What is wrong with a stored stream that should have a SHA-256; null if nothing is. */
function wrongIn(read: StreamRead, right: string | undefined): string | null {
  if ("problem" in read) return read.problem;
  const { sha256, refused } = read;
  if (sha256 !== right)
    return `is damaged: it has the SHA-256 ${sha256}, and should have ${right ?? "one"}`;
  return refused === null ? null : `has the right SHA-256, but cannot be received: ${refused}`;
}

/** The streams that are asked for: of one snapshot all that it needs. */
function streamsToVerify(
  { streams }: Store,
  all: ReadonlyMap<string, Stream>,
  { snapshot, prefix }: VerifyOptions,
): Stream[] {
  if (snapshot === null)
    return streams.filter(({ name }) => prefix === null || parseName(name, prefix) !== null);
  const named = streams.filter(({ name }) => name === snapshot);
  return [...new Set(named.flatMap((one) => chainOf(one, all)))];
}

/**
 * The SHA-256 of a stored stream, or why it cannot be told. `refused`: why the stream could not be
 * received, as far as that can be told here.
 */
type StreamRead =
  { readonly sha256: string; readonly refused: string | null } | { readonly problem: string };

/** Reads one stored stream: here, if it can be read along; else where it is stored. */
async function readStream(
  folder: Folder,
  verbs: StoreVerbs,
  stored: Stream,
  counts: (bytes: number | null) => void,
): Promise<StreamRead> {
  const { uuid: object, compressed, encrypted } = stored;
  let refused: string | null = null;
  if (
    !encrypted &&
    folder.host.ssh === null &&
    !(compressed && which.sync("zstd", { nothrow: true }) === null)
  ) {
    const unpack: Stage[] = compressed ? [{ label: "zstd", command: "zstd -q -d -c" }] : [];
    const read = await pipeline([
      fetching(folder, verbs, object),
      relayStage({ sum: true }, counts),
      ...unpack,
      relayStage({ check: expectedOf(stored), drop: true }),
    ]).catch((error: Error) => error.message);
    checkInterruption();
    if (typeof read !== "string") return { sha256: read.summed?.sum ?? "", refused };
    refused = read; // or it is damaged, which its sum tells
  }
  try {
    const [sha256 = ""] = await askSums(folder, verbs, [object], object);
    return { sha256, refused };
  } catch (error) {
    checkInterruption();
    return { problem: (error as Error).message };
  }
}

/** What a stored stream must say of itself. */
const expectedOf = ({ name, receivedUuid, from }: Stream): Expected => ({
  name,
  uuid: receivedUuid as string,
  parent: from,
  alone: false,
});

/** The SHA-256 of stored streams, by the host that has them. `what`: how an error calls them. */
async function askSums(
  folder: Folder,
  verbs: StoreVerbs,
  objects: readonly string[],
  what: string,
): Promise<string[]> {
  const given = { ...at(folder), how: "sum", holder: "", objects };
  const text = await ask(folder.host, verbs.fetch, given, `${folder.id}: cannot read ${what}`);
  return text.match(/^[0-9a-f]{64}/gm) ?? [];
}

/** Small streams, in bytes: how large one is at most, and all that are read at a time. */
const SMALL_STREAMS = { one: 1 << 20, all: 32 << 20 };

/**
 * Reads many small streams with one process: here those that are no more than a stream, for what
 * each is; of all others, on another host, their sums. What cannot be read so is not in the result.
 */
async function readSmall(
  folder: Folder,
  verbs: StoreVerbs,
  streams: readonly Stream[],
): Promise<Map<Stream, StreamRead>> {
  const reads = new Map<Stream, StreamRead>();
  if (!verbs.isDirectory) return reads;
  const isLocal = folder.host.ssh === null;
  const plain = streams.filter(({ compressed, encrypted }) => !compressed && !encrypted);
  for (const batch of smallOnes(isLocal ? plain : streams))
    try {
      const read = await (isLocal ? readHere : sumsThere)(folder, batch);
      read.forEach((one, i) => reads.set(batch[i] as Stream, one));
    } catch (error) {
      if (!(error instanceof Failure)) throw error; // each is read by itself then, and told of
    }
  return reads;
}

/** Reads streams here; nothing of them if they are not as long as they were. Errors: Failure. */
async function readHere(folder: Folder, batch: readonly Stream[]): Promise<StreamRead[]> {
  const given = { ...at(folder), holder: "", objects: batch.map(({ uuid }) => uuid), how: "" };
  const bytes = await askBytes(folder.host, RAW.fetch, given, `${folder.id}: cannot read streams`);
  if (bytes.length !== bytesOf(batch)) return [];
  let done = 0;
  return batch.map((one) => {
    const own = bytes.subarray(done, (done += one.bytes));
    return {
      sha256: createHash("sha256").update(own).digest("hex"),
      refused: refusedFor(one, own),
    };
  });
}

/** Asks another host for the sums of streams; returns all or none. Errors: Failure. */
async function sumsThere(folder: Folder, batch: readonly Stream[]): Promise<StreamRead[]> {
  const objects = batch.map(({ uuid }) => uuid);
  const sums = await askSums(folder, RAW, objects, "streams");
  return sums.length === batch.length ? sums.map((sha256) => ({ sha256, refused: null })) : [];
}

/** Small streams of a folder, as many at a time as are read at once. */
function smallOnes(streams: readonly Stream[]): Stream[][] {
  const small = streams.filter(({ bytes }) => bytes <= SMALL_STREAMS.one);
  return batchesOf(small, ({ bytes }) => bytes, SMALL_STREAMS.all).flatMap((some) =>
    batchesOf(some, ({ uuid }) => argumentBytes(uuid), RECORD_BYTES),
  );
}

/** Why a stream could not be received; null if it could. */
function refusedFor(stored: Stream, bytes: Buffer): string | null {
  try {
    const { pass, finish } = streamCheck(expecting(expectedOf(stored)));
    pass(bytes, 0, bytes.length);
    finish();
    return null;
  } catch (error) {
    return (error as Error).message;
  }
}

// The words that `stat` prints of a path; sha256sum and getfattr tell the rest.
const STAT_FORMAT = "%n\\0%f\\0%u:%g\\0%s\\0%.9Y\\0%t:%T\\0%i\\0%N\\0";

/** printf's format of a word of what it prints. */
const STAT_WORD = "%s\\0";

/**
 * What a stream carries of a file besides its contents and attributes. What has no meaning for the
 * type of file is left out.
 */
export type FileState = {
  readonly type: string;
  readonly mode: string;
  readonly owner: string;
  readonly mtime: string;
  readonly size?: string;
  readonly device?: string;
  readonly target?: string;
};

/** The types of files by the first four bits of st_mode: inode(7). */
const FILE_TYPES: Readonly<Record<number, string>> = {
  1: "fifo",
  2: "character device",
  4: "directory",
  6: "block device",
  8: "file",
  10: "symbolic link",
  12: "socket",
};

type Stat = [
  path: string,
  mode: string,
  owner: string,
  size: string,
  mtime: string,
  device: string,
  inode: string,
  shown: string,
];

/** Reads the words of STAT_FORMAT. Errors: Failure for any other shape. */
export function parseStats(
  words: readonly string[],
): { path: string; inode: string; state: FileState }[] {
  const files: ReturnType<typeof parseStats> = [];
  for (let i = 0; i < words.length; i += 8) {
    const file = words.slice(i, i + 8);
    const [path, rawMode, owner, size, mtime, device, inode, shown] = file as Stat;
    if (file.length < 8 || !/^[0-9a-f]+$/.test(rawMode))
      throw new Failure(`cannot read what "stat" printed: ${file.join(" ")}`);
    const bits = parseInt(rawMode, 16);
    const type = FILE_TYPES[bits >> 12] ?? "unknown";
    const mode = (bits & 0o7777).toString(8);
    const arrow = shown.startsWith(`'${path}' -> `) ? path.length + 2 : shown.indexOf(" -> ");
    const state = {
      type,
      mode,
      owner,
      mtime,
      ...(type.endsWith("device") && { device }),
      ...(type === "symbolic link" && { target: shown.slice(arrow + 4) }),
      ...(type === "file" && { size }),
    };
    files.push({ path, inode, state });
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
  const blocks = words
    .slice(sums + 1)
    .join("\0")
    .split("\n\n");
  const attributes = new Map(
    blocks.map((block) => {
      const [file = "", ...values] = block.replace(/^\n+/, "").split("\n");
      const path = file
        .replace("# file: ", "")
        .replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(parseInt(octal, 8)));
      return [path, values.sort().join(" ")];
    }),
  );
  const firsts = new Map<string, string>();
  return new Map(
    parseStats(words.slice(0, stats)).map(({ path, inode, state }) => {
      const linked = state.type === "directory" ? undefined : firsts.get(inode);
      if (state.type !== "directory" && linked === undefined) firsts.set(inode, path);
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
async function differencesBetween(...sides: readonly [Folder, Snapshot][]): Promise<string[]> {
  const listed = async ([folder, { name }]: [Folder, Snapshot]) => {
    const given = { ...at(folder), snapshot: name, format: STAT_FORMAT };
    const base64 = await ask(folder.host, LISTING, given, `${folder.id}: cannot list ${name}`);
    return Buffer.from(base64, "base64").toString("latin1");
  };
  const texts = await Promise.all(sides.map(listed));
  const [a, b] = texts.map(parseListing) as [Listing, Listing];
  const lines = [...new Set([...a.keys(), ...b.keys()])].sort().flatMap((path) => {
    const [x, y] = [a.get(path), b.get(path)];
    const shown = /[\x00-\x1f\x7f]/.test(path) ? JSON.stringify(asText(path)) : asText(path);
    if (x === undefined || y === undefined)
      return [`${shown} is only in ${sides[x === undefined ? 1 : 0]?.[0].id}`];
    const how = [...new Set([...Object.keys(x), ...Object.keys(y)])]
      .filter((key) => x[key] !== y[key])
      .map((key) =>
        key === "contents" || key === "attributes"
          ? key
          : `${key} ${asText(x[key] ?? "none")} and ${asText(y[key] ?? "none")}`,
      );
    return how.length === 0 ? [] : [`${shown}: ${how.join(", ")}`];
  });
  if (lines.length > 0) return lines;
  const isMissing = texts.some((text) => text.endsWith("missing\n"));
  return [
    `extended attributes or ACLs${isMissing ? "; install attr on both sides to see of what" : ""}`,
  ];
}
type Listing = ReturnType<typeof parseListing>;

// ── versions: a file, as the snapshots have it ──

export type VersionsOptions = ReturnType<typeof versionsOptions>;

/** Shows every version of a file that a snapshot or backup still has, or copies one back. */
export async function versions(o: VersionsOptions, report: Report): Promise<void> {
  const { file, get } = o;
  const host = hostOf(file.host, o.hosts);
  const cannot = `${file.id}: cannot find its subvolume`;
  const [root = "", inner = ""] = (await ask(host, LOCATE, { file: file.path }, cannot)).split(
    "\0",
  );
  const member = await memberWith(o, root, normalize(root + inner));
  const source = {
    ...file,
    path: member?.folder ?? root,
    id: file.id.slice(0, -file.path.length) + (member?.path ?? root),
  };
  // One place that has the version is enough to give it back.
  const heard =
    get === null
      ? report
      : { ...report, error: (_: unknown, { message }: Error) => report.warning(message) };
  const locations = await Promise.all(o.locations.map((one) => placeHaving(one, member, o)));
  const all = [source, ...locations];
  const opened = (await openColumns(all, locations.length === 0, o, heard as Report)).map(
    (column, i) => (i === 0 ? withLive(column, member) : column),
  );
  const isNamed = ({ id }: Column) => locations.some((one) => one.id === id);
  const columns = opened.filter((one) => one.folder?.store == null || isNamed(one));
  for (const one of opened.filter((left) => !columns.includes(left)))
    log.info(
      `${one.id} is not looked into: it has streams, which are received for that if it is named`,
    );
  const path = member?.inner ?? pathWithin(file.path, columns) ?? normalize(inner);
  const asked = await askForStates(path, columns, heard as Report);
  const found = { columns: asked.map(({ column }) => column), seen: sightingsIn(asked) };
  const sought = { o, report, host, path, source, ...found };
  if (get !== null) return getVersion(sought, get);
  await lookIntoStores(sought);
  const shown = await showVersions(sought);
  if (shown === 0 && !isMute(found.columns)) tellFailure(report, null, noVersion(sought));
  report.event("summary", { ok: !report.failed, versions: shown });
}

/** Nobody has answered, which is told already. */
const isMute = (columns: readonly Column[]) =>
  columns.some(({ problem }) => problem !== null) && columns.every(({ folder }) => folder === null);

/** What is told where no version was found. */
function noVersion({ o, source, seen: { length } }: Sought): string {
  const none =
    length === 0 ? ": there are no snapshots" : ` is in none of ${plural(length, "snapshot")}`;
  return `${o.file.id}${none} of ${source.id}`;
}

/** A member of a tree that has a file. */
type MemberHaving = {
  /** Its path on its host, below its source, and that of its snapshots' folder. */
  readonly path: string;
  readonly member: string;
  readonly folder: string;
  /** The file's path below it. */
  readonly inner: string;
  /** The subvolume itself, where it is there. */
  readonly live: Folder["source"];
};

/**
 * The member of a tree that a file lies in; null where it lies in none. `root`: the subvolume that
 * is there.
 */
async function memberWith(
  { file, snapshotFolder, hosts }: VersionsOptions,
  root: string,
  path: string,
): Promise<MemberHaving | null> {
  // What cannot be opened is told when it is looked into.
  const seen = await lookAt(file, root, "", hosts).catch(() => null);
  if (seen === null || seen.alone || seen.place.filesystem === null) return null;
  const { mount, top } = placeOn(seen.mounts, seen.path);
  const below = path.slice(seen.path === "/" ? 0 : seen.path.length);
  const isGiven = snapshotFolder.startsWith("/");
  const given = isGiven ? placeOn(seen.mounts, withoutSlash(normalize(snapshotFolder))).top : null;
  const tops = { file: join(top, below), folder: given };
  const found = memberHaving(tops, snapshotFolder, seen.subvolumes);
  if (found === null) return null;
  const member = join(found.source, found.member);
  const through = (one: string) =>
    isWithin(one, mount.root)
      ? join(mount.path, one.slice(mount.root === "/" ? 0 : mount.root.length))
      : null;
  const [itself, folder] = [
    through(member),
    isGiven ? join(withoutSlash(normalize(snapshotFolder)), found.member) : through(found.folder),
  ];
  if (itself === null || folder === null) return null;
  const live = member === top ? { ...seen.place, top, uuid: "" } : null;
  return {
    path: itself,
    member: found.member,
    folder,
    inner: tops.file.slice(member.length),
    live,
  };
}

/** A given LOCATION, or the folder below it that has a member's backups. */
async function placeHaving(
  location: Readable,
  member: MemberHaving | null,
  { hosts }: VersionsOptions,
): Promise<Readable> {
  if (member === null) return location;
  const seen = await lookAt(location, location.path, "", hosts).catch(() => null);
  if (seen === null) return location;
  const below =
    seen.store === null
      ? membersBelow(seen, null)
      : (await storedBelow(seen, location)).map(({ path }) => path);
  const has = below.includes(member.member);
  return has ? placeBelow(location, member.member) : location;
}

/** A member's snapshots, with what the subvolume is now. */
const withLive = ({ folder, ...column }: Column, member: MemberHaving | null): Column => ({
  ...column,
  folder: folder && member?.live ? { ...folder, source: member.live } : folder,
});

/** Shows the versions of a file, newest first. Returns how many there are. */
async function showVersions({ o, report, host, path, columns, seen }: Sought): Promise<number> {
  const known = seen.flatMap((one) =>
    one.state === undefined ? [] : [{ ...one, state: one.state }],
  );
  const rows = versionsAmong(known)
    .reverse()
    .map((row) => ({ ...row, columns: [...row.columns].sort((a, b) => a - b) }));
  const live = columns[0]?.folder?.source;
  const top = live && { folder: live.path, fsid: `${live.fsid}/` };
  const now = top ? ((await statesIn(host, top, path, ["."])).get(".") ?? null) : undefined;
  for (const { first, last, state, columns: having, names } of rows)
    report.event("version", {
      first,
      last,
      state,
      snapshots: names,
      locations: having.map((i) => columns[i]?.id),
    });
  if (!o.json && rows.length > 0) print(versionsTable(columns, rows, now));
  return rows.length;
}

/** What was seen of a file: a row for each run of snapshots that have the same. */
export type Version = {
  readonly first: string;
  last: string;
  readonly state: FileState | null;
  readonly names: string[];
  readonly columns: Set<number>;
};

/**
 * What a snapshot has of a file, and the columns that have the snapshot, each as its entry there.
 * `state`: undefined as long as only streams tell it, which were not received.
 */
type Sighting = NamedTime & {
  state: FileState | null | undefined;
  readonly columns: readonly number[];
  readonly entries: ReadonlyMap<number, Snapshot>;
};

/** A file that is looked for, its path below the subvolume, and the sightings, oldest first. */
type Sought = {
  readonly o: VersionsOptions;
  readonly report: Report;
  readonly host: Host;
  readonly path: string;
  /** FILE's subvolume. */
  readonly source: Readable;
  readonly columns: readonly Column[];
  readonly seen: readonly Sighting[];
};

/** Where a source that is lost altogether was, its backups know: the path of FILE below it. */
function pathWithin(file: string, columns: readonly Column[]): string | null {
  if (columns[0]?.folder?.snapshots.length) return null;
  const owners = columns.map(({ folder }) => folder?.chain.owner);
  const lost = owners.find((owner) => owner !== undefined && isWithin(file, owner.path));
  if (lost === undefined) return null;
  return file.slice(lost.path === "/" ? 0 : lost.path.length);
}

/** A column, with what its snapshots have of a file; null for what nobody asks, or has asked yet. */
type AskedColumn = {
  readonly column: Column;
  readonly states: ReadonlyMap<string, FileState> | null;
};

/**
 * Asks each folder what it has of a file. One that does not answer, such as a key that may not read,
 * is told, and keeps no other. Errors: all but Failures.
 */
const askForStates = (path: string, columns: readonly Column[], report: Report) =>
  Promise.all(
    columns.map(async (column): Promise<AskedColumn> => {
      const { id, folder } = column;
      if (folder === null || folder.store !== null) return { column, states: null };
      const names = wholeIn(folder).map(({ name }) => name);
      return statesIn(folder.host, at(folder), path, names).then(
        (states) => ({ column, states }),
        afterFailure((failure) => {
          report.error(id, failure);
          const lost = { id, folder: null, problem: failure.message };
          return { column: lost, states: null };
        }),
      );
    }),
  );

/** The sightings in what was told of a file, oldest first. */
function sightingsIn(asked: readonly AskedColumn[]): Sighting[] {
  const folders = asked.map(({ column }) => column.folder);
  const states = asked.map((one) => one.states);
  return align(folders).flatMap(({ cells }) => {
    const entries = new Map(
      cells.flatMap((cell, i) => (cell?.state === "whole" ? [[i, cell.entry] as const] : [])),
    );
    const known = [...entries].find(([i]) => states[i] !== null);
    const [column, entry] = known ?? [...entries][0] ?? [];
    if (column === undefined || entry === undefined) return [];
    const { name, time } = entry;
    const state = known === undefined ? undefined : (states[column]?.get(name) ?? null);
    return [{ name, time, state, columns: [...entries.keys()], entries }];
  });
}

/** Looks into what only streams have, which are received for that. */
async function lookIntoStores(sought: Sought): Promise<void> {
  for (const column of sought.columns.keys()) {
    const unknown = sought.seen.filter(
      ({ state, entries }) => state === undefined && entries.has(column),
    );
    const lost = (error: Failure) => sought.report.error(sought.columns[column]?.id ?? null, error);
    if (unknown.length > 0)
      await lookIntoStreams(sought, column, { asked: unknown, lost }).catch(lostUnless(lost));
  }
}

/** What a store as a whole fails by is told as well. Errors: any that is no Failure. */
const lostUnless = (lost: (error: Failure) => void) => (error: unknown) => {
  checkInterruption();
  if (!(error instanceof Failure)) throw error;
  lost(error);
};

/** What is looked for in the streams of a store; `see` is called where a sighting is received. */
type LookIntoStreams = {
  readonly asked: readonly Sighting[];
  readonly see?: (sighting: Sighting, scratch: Folder, name: string) => Promise<void>;
  readonly lost?: (error: Failure) => void;
};

/** Receives streams of a column's store, and sets the state of what is asked for. */
async function lookIntoStreams(
  { o, report, path, source, columns }: Sought,
  column: number,
  { asked, see, lost }: LookIntoStreams,
): Promise<void> {
  const location = columns[column]?.folder as Folder;
  const store = location.store as Store;
  const entryOf = ({ entries }: Sighting) => entries.get(column) as Snapshot;
  const visits = planVisits(new Set(asked.map((one) => entryOf(one).uuid)), store.streams);
  const byData = new Map(asked.map((one) => [entryOf(one).receivedUuid, one]));
  const folder = columns[0]?.folder;
  const beside = folder ? { location: source, folder } : null;
  const place = scratchPlace(o.scratch, beside, visits);
  const bytes = bytesOf(visits.map(({ piece }) => piece));
  log.info(
    `Receiving ${plural(visits.length, "stream")} of ${location.id}, ${inBytes(bytes)}, one after the other in ${place.path}`,
  );
  const visiting = { o, report, display: displayOf(o), location, store, visits, place };
  await visitStreams(
    visiting,
    async ({ name, receivedUuid }, own) => {
      const sighting = byData.get(receivedUuid) as Sighting;
      sighting.state = (await statesIn(own.host, at(own), path, [name])).get(name) ?? null;
      await see?.(sighting, own, name);
    },
    lost,
  );
}

/** What `stat` says of a path in many subvolumes of a folder; nothing where it is not. */
async function statesIn(
  host: Host,
  folder: ReturnType<typeof at>,
  path: string,
  names: readonly string[],
): Promise<Map<string, FileState>> {
  const found = new Map<string, FileState>();
  for (const some of inArguments(names)) {
    const given = { ...folder, format: STAT_FORMAT, word: STAT_WORD, inner: path, names: some };
    const words = (await ask(host, VERSIONS, given, `cannot look for ${path}`)).split("\0");
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

/** The versions of a file. `seen`: oldest first. */
export function versionsAmong(
  seen: readonly (Pick<Version, "state"> & Pick<Sighting, "name" | "columns">)[],
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

/** Versions as people read them, newest first. `now`: what FILE is, where that is known. */
function versionsTable(
  columns: readonly Column[],
  rows: readonly (Omit<Version, "columns"> & { readonly columns: readonly number[] })[],
  now: FileState | null | undefined,
): string {
  const cells = rows.map(({ first, last, state, columns: having }, i) => {
    const isNow = i === 0 && JSON.stringify(now) === JSON.stringify(state);
    const where = having.map(columnLetter).join(" ") + (isNow ? " (as it is now)" : "");
    if (state === null) return [first, last, "deleted", "-", where];
    const { size, type, mtime } = state;
    const modified = stamp(new Date(Number(mtime) * 1000)).replace(
      /(....)(..)(..)-(..)(..)(..)/,
      "$1-$2-$3 $4:$5:$6",
    );
    return [first, last, size === undefined ? type : inBytes(Number(size)), modified, where];
  });
  const legend = columns.map(
    (column, i) => `${columnLetter(i)}  ${column.id}${whyEmpty(column)}\n`,
  );
  return `${legend.join("")}\n${alignedTable([["FIRST IN", "LAST IN", "SIZE", "MODIFIED", "WHERE"], ...cells])}`;
}

/** Whether the value of --get is a time, and not a name. */
const isTime = (get: string) => /^\d{4}-/.test(get);

/** Copies a version of a file back to its host: the newest that is asked for, and has the file. */
async function getVersion(sought: Sought, get: string): Promise<void> {
  const { o, report, seen } = sought;
  if (isMute(sought.columns)) throw new Failure(`${o.file.id}: no place could be looked into`);
  const until = isTime(get) ? parseWhen(get) : null;
  const asked = seen.filter(({ name, time }) => (until === null ? name === get : time <= until));
  for (const one of asked.toReversed())
    if (one.state !== null && (await wasGiven(sought, one, asked))) {
      report.event("summary", { ok: !report.failed });
      return;
    }
  const first = seen[0] === undefined ? "" : `; the first one is ${seen[0].name}`;
  const earlier = `in no snapshot from that time or before${first}`;
  throw new Failure(`${o.file.id}: ${until === null ? `not in a snapshot ${get}` : earlier}`);
}

/**
 * Copies one version back, unless the file proves not to be in it. `asked`: what is looked into on
 * the way, where streams are received.
 */
async function wasGiven(
  sought: Sought,
  one: Sighting,
  asked: readonly Sighting[],
): Promise<boolean> {
  const { host, columns } = sought;
  const folderAt = (i: number) => columns[i]?.folder as Folder;
  const having = one.columns.filter((i) => folderAt(i).store === null);
  const column = having.find((i) => sameHost(folderAt(i).host, host)) ?? having[0];
  if (column !== undefined) {
    const folder = folderAt(column);
    await giveBack(sought, one, folder.id, [folder, (one.entries.get(column) as Snapshot).name]);
    return true;
  }
  const [stored] = one.columns as [number];
  const { id, store } = folderAt(stored) as Folder & { readonly store: Store };
  const chain = new Set(
    piecesOf(one.entries.get(stored) as Snapshot, store).map(({ receivedUuid }) => receivedUuid),
  );
  const onTheWay = asked.filter(
    ({ state, entries }) =>
      state === undefined && chain.has(entries.get(stored)?.receivedUuid ?? null),
  );
  await lookIntoStreams(sought, stored, {
    asked: [...new Set([...onTheWay, one])],
    async see(sighting, scratch, name) {
      if (sighting === one && one.state != null) await giveBack(sought, one, id, [scratch, name]);
    },
  });
  return one.state != null;
}

/** Copies a version out of a subvolume of a folder. `from`: the place that has it. */
async function giveBack(
  { o, report, host, path }: Sought,
  { name }: Sighting,
  from: string,
  subvolume: readonly [Folder, string],
): Promise<void> {
  const to = o.to ?? `${o.file.path}.${name}`;
  const put = { directory: dirname(to), name: basename(to), force: o.force ? "force" : "" };
  await copyOut(subvolume, path, host, { put });
  log.info(`Copied ${path.slice(1)} as it was in ${name} of ${from} to ${to}`);
  report.event("get", { location: from, name, path: to });
}

// ── drill: proof by restoring ──

export type DrillOptions = ReturnType<typeof drillOptions>;

/** Restores a backup into a scratch subvolume, compares or reads all of it, and removes it. */
export async function drill(o: DrillOptions, report: Report): Promise<void> {
  const { metrics, location } = o;
  const before = metrics === null ? "" : readIfThere(metrics);
  parseDrills(before);
  const found: DrillFound = { source: null };
  await drillOnce(o, found, report).catch((error: unknown) => {
    checkInterruption();
    if (error instanceof UsageError) throw error;
    report.error(location.id, error);
  });
  const ended = { destination: location.id, isGood: !report.failed, now: Date.now() };
  if (metrics !== null)
    await writeMetrics(metrics, metricsOfDrills(before, { source: found.source, ...ended }));
  report.event("summary", { ok: !report.failed });
}

/** What becomes known of a drill on the way: the path of the source. */
type DrillFound = { source: string | null };

async function drillOnce(o: DrillOptions, found: DrillFound, report: Report): Promise<void> {
  const location = await openLocation(o.location, { ...o, wait: "look" });
  await location.close();
  if (location.store === null && isSnapshotFolder(location))
    throw new UsageError(
      `${location.id} has a source's own snapshots: a drill is for what its destinations have`,
    );
  const chosen = chooseToDrill(location, o);
  const { source, original } = await findOriginal(location, chosen, o);
  found.source = source;
  const place = o.isBeside ? { ...o.location, path: location.path } : o.scratch;
  const work = async (scratch: Scratch) => {
    log.info(`Restoring ${chosen.name} from ${location.id} for a while in ${scratch.target.path}`);
    const of = { o, report, display: displayOf(o), location };
    let [sha256, reading] = ["", 0];
    const times = await restoreInto(scratch, of, chosen, async (name) => {
      const began = Date.now();
      sha256 = await compareRestored([scratch.folder, { ...chosen, name }], location, original);
      reading = (Date.now() - began) / 1000;
    });
    return { ...times, sha256, reading };
  };
  // Backups on a disk that is full can be tried as well.
  const isReflinked = (folder: Folder) => location.store === null && isHere(location, folder);
  const restored = await inScratch(o, place, work, isReflinked);
  const everything = await timeForAll(location, chosen, restored);
  const { bytes, seconds, reading, sha256 } = restored;
  const compared = original === null ? null : join(original[0].path, original[1].name);
  report.event("drill", {
    location: location.id,
    name: chosen.name,
    compared,
    sha256,
    bytes,
    seconds,
    reading,
    everything,
  });
  const how = compared === null ? "every file can be read" : `it is the same as ${compared}`;
  log.info(
    `${chosen.name} of ${location.id} was restored in ${inTime(seconds)}${bytes === null ? ", reflinked" : ` (${inBytes(bytes)})`}, read in ${inTime(reading)}, and removed: ${how} (SHA-256 ${sha256})`,
  );
  if (everything !== null)
    log.info(
      `To restore everything from here, the newest with all that it builds on, would take some ${inTime(everything)}`,
    );
}

/** The backup that a drill restores. Errors: Failure telling what there is. */
function chooseToDrill(location: Folder, { snapshot, random }: DrillOptions): Snapshot {
  const { store, prefix } = location;
  const stored = store?.streams.filter((one) => one.stored);
  // Also a stream that lacks what it builds on: that is what a drill is to find.
  const all = stored === undefined ? wholeIn(location) : snapshotsAmong(stored, prefix, null);
  const any = all[Math.floor(Math.random() * all.length)];
  const name = store === null ? any?.name : any?.path;
  const wanted = random ? (name ?? null) : snapshot;
  const chosen = chooseSnapshot(location, { snapshot: wanted, before: null });
  if (prefixOf(chosen.name) === null)
    throw new Failure(`${location.id}: ${chosen.name} has no time in its name, and is no backup`);
  return chosen;
}

/**
 * The source's snapshot of the same data on this host, or another copy of it, and the path of the
 * source: as the record says, or where it is on this host.
 */
async function findOriginal(
  location: Folder,
  chosen: Snapshot,
  { hosts }: DrillOptions,
): Promise<{ source: string | null; original: readonly [Folder, Entry] | null }> {
  const { owner } = location.chain;
  const stream = location.store?.streams.find(({ uuid }) => uuid === chosen.uuid);
  const uuid = owner?.uuid ?? stream?.owner.uuid;
  const found = await Promise.all(
    [...groupBy(btrfsMounts(), ({ device }) => device).values()].map(async (mounts) => {
      const seen = await lookHere(mounts[0]?.path ?? "/", hosts);
      if (seen === null || seen.alone) return null;
      const source = seen.subvolumes.find((one) => one.uuid === uuid);
      const full = visiblePath(sameDataAmong(chosen, seen.subvolumes), mounts);
      const folder = full === null ? null : await lookHere(dirname(full), hosts);
      return { source: visiblePath(source, mounts), folder };
    }),
  );
  const copies = found.flatMap((one): (readonly [Folder, Entry])[] => {
    const entry = one?.folder && sameDataAmong(chosen, one.folder.standing);
    return entry ? [[one.folder as Folder, entry]] : [];
  });
  return {
    source: owner?.path ?? found.find((one) => one?.source)?.source ?? null,
    original: copies.find(([, one]) => one.uuid === dataOf(chosen)) ?? copies[0] ?? null,
  };
}

/** The mounts of btrfs on this host. */
function btrfsMounts(): Mount[] {
  const lines = readIfThere("/proc/self/mountinfo").split("\n");
  return parseMounts(lines.filter((line) => / - btrfs /.test(line)).join("\n")).filter(({ path }) =>
    path.startsWith("/"),
  );
}

/** A folder of this host, if it can be looked at. */
async function lookHere(path: string, hosts: Hosts): Promise<Folder | null> {
  const here = { ...(parseLocation("/") as Readable), id: path, path };
  return lookAt(here, path, "", hosts).catch(afterFailure(() => null));
}

/** Where a subvolume can be reached through one of some mounts of its filesystem. */
function visiblePath(one: Subvolume | undefined, mounts: readonly Mount[]): string | null {
  const top = `/${one?.path}`;
  const mount = mounts.find(({ root }) => isWithin(top, root) && top !== root);
  if (one === undefined || mount === undefined) return null;
  return join(mount.path, top.slice(mount.root === "/" ? 0 : mount.root.length));
}

/** How long a restore took; `bytes` are those of streams, null where nothing had to be sent. */
type RestoreTime = { readonly bytes: number | null; readonly seconds: number };

/**
 * Restores a backup into a scratch directory, as restore does where nothing of it is there, and
 * lets `read` look at the subvolume.
 */
async function restoreInto(
  { folder, target, work }: Scratch,
  of: Pick<Visiting, "report" | "display" | "location"> & { readonly o: DrillOptions },
  chosen: Snapshot,
  read: (name: EntryName) => Promise<void>,
): Promise<RestoreTime> {
  const { o, location } = of;
  const { store } = location;
  const began = Date.now();
  const passed = () => (Date.now() - began) / 1000;
  const arrival = { ...of, o: { ...o, target: o.scratch }, folder, target };
  if (store !== null) {
    const visits = planVisits(new Set([chosen.uuid]), store.streams);
    const bytes = bytesOf(visits.map(({ piece }) => piece));
    let seconds = 0;
    const see = async ({ name }: Stream) => {
      seconds = passed();
      await read(name);
    };
    await receiveVisits(arrival, { store, visits, see, lost: undefined });
    return { bytes, seconds };
  }
  if (!isHere(location, target)) {
    const sent = await receiveOn({ ...arrival, sums: new Map() }, chosen, null);
    await read(chosen.name);
    return sent;
  }
  const built = { ...at(target), work, target: target.path, name: chosen.name, how: "none" };
  const origin = throughMount(target).through(join(location.top, chosen.name));
  await ask(target.host, BUILD, { ...built, origin }, `cannot restore ${chosen.name}`);
  const seconds = passed();
  await read("tree" as EntryName);
  return { bytes: null, seconds };
}

/** The SHA-256 of a restored backup. Errors: Failure where it is not what the original is. */
async function compareRestored(
  restored: readonly [Folder, Snapshot],
  location: Folder,
  original: readonly [Folder, Entry] | null,
): Promise<string> {
  if (original === null) return (await digestIn(...restored)).sum;
  const [folder, entry] = original;
  const sides = [digestIn(...restored), digestIn(folder, entry)];
  const [left, right] = (await allOf(sides)) as [Summed, Summed];
  if (left.sum === right.sum) return left.sum;
  const [own, snapshot] = restored;
  const { name } = entry;
  const differences = await differencesBetween(
    [{ ...own, id: location.id }, snapshot],
    [folder, { ...snapshot, name }],
  );
  throw new Failure(
    `${location.id}: what was restored differs from ${join(folder.path, entry.name)}: ${firstFew(differences, 10, "; ")}`,
  );
}

/**
 * How many seconds the newest backup would take from there, by what another one took; null where
 * that cannot be told.
 */
async function timeForAll(
  location: Folder,
  chosen: Snapshot,
  { bytes, seconds, reading }: RestoreTime & { readonly reading: number },
): Promise<number | null> {
  const { store } = location;
  const took = bytes === null ? reading : seconds;
  const newest = wholeIn(location).at(-1);
  if (newest === undefined || newest.uuid === chosen.uuid) return took;
  const sizeOf = async (one: Snapshot) =>
    store === null
      ? streamBytes(location, { snapshot: one, parent: null })
      : bytesOf(piecesOf(one, store));
  return Promise.all([newest, chosen].map(sizeOf))
    .then(([all = 0, some = 0]) => (took * all) / Math.max(some, 1))
    .catch(afterFailure(() => null));
}

/** Seconds as people read them. */
const inTime = (seconds: number) =>
  seconds < 60 ? `${seconds.toFixed(1)} s` : inWords(1000 * seconds);

// ── diff: what changed between two snapshots, and what it costs ──

export type DiffOptions = LookOptions & {
  readonly location: Readable;
  /** The older one, and the newer; null for the newest of a source, and now. */
  readonly names: readonly [string, string] | null;
  /** Only what is there or below; empty for everything. */
  readonly paths: readonly string[];
  readonly summary: boolean;
  readonly json: boolean;
};

/** Shows what changed between two snapshots. No file is read: `btrfs send` tells it. */
export async function diff(o: DiffOptions, report: Report): Promise<void> {
  const [first] = o.names ?? [];
  const prefix = o.prefix ?? (first === undefined ? null : prefixOf(first));
  const folder = await openLocation(o.location, { ...o, prefix, wait: "look" });
  needRoot(folder, "telling what changed");
  const within = o.paths.map((path) => pathInside(path, folder));
  const { from, to, read } =
    o.names === null ? await sinceNewest(folder) : await betweenTwo(folder, o.names);
  const reader = differenceReader(dataOf(from));
  await read(reader.feed);
  const isWanted = (path: string) =>
    within.length === 0 || within.some((one) => isBelow(path, one));
  const own = ownFolderIn(folder, o);
  const all = reader.finish().filter((one) => {
    const isOwn = one.path === own && one.what === "changed";
    return !isOwn && [one.path, one.from ?? one.path].some(isWanted);
  });
  if (o.summary) showDirectories(all, o, report);
  else showDifferences(all, o, report);
  tellTotals(all, { from: from.name, to, paths: o.paths }, report);
}

/**
 * The path in a subvolume of the folder where its snapshots are taken, which changes with each; null
 * where that is elsewhere.
 */
function ownFolderIn(
  { source, path }: Pick<Folder, "source" | "path">,
  { snapshotFolder }: Pick<DiffOptions, "snapshotFolder">,
): string | null {
  const isInside = source !== null && isWithin(path, source.path) && path !== source.path;
  const own = isInside ? relative(source.path, path) : snapshotFolder;
  return own.startsWith("/") ? null : Buffer.from(normalize(own)).toString("latin1");
}

/** A difference to be read: from a snapshot to what is named. */
type DifferenceAsked = {
  readonly from: Snapshot;
  readonly to: string;
  readonly read: (take: (piece: Buffer) => void) => Promise<void>;
};

/** The difference between two snapshots of a folder. Errors: Failure where they are not related. */
async function betweenTwo(
  folder: Folder,
  names: readonly [string, string],
): Promise<DifferenceAsked> {
  const [from, to] = names.map((name) => completeNamed(folder, name)) as [Snapshot, Snapshot];
  if (from.uuid === to.uuid)
    throw new UsageError(`${from.name} is given twice: give two snapshots to compare`);
  const inquiry = inquiryInto(folder);
  if (areComparable(from, to, inquiry) === undefined)
    await learnBirths(inquiry, [{ parent: from, snapshot: to }]);
  needComparable(from, to.name, areComparable(from, to, inquiry));
  const given = { ...at(folder), snapshot: to.name, parent: from.name };
  const what = `${folder.id}: cannot tell what differs between ${from.name} and ${to.name}`;
  return {
    from,
    to: to.name,
    read: (take) => askInPieces([folder.host, DIFFERENCE, given, what], take),
  };
}

/** A snapshot by its name, of whatever prefix. Errors: Failure where nothing complete has it. */
function completeNamed(folder: Folder, name: string): Snapshot {
  const there = underPrefix(folder, prefixOf(name) ?? "");
  const isOwn = isSnapshotFolder(there);
  const found = there.snapshots.find((one) => one.name === name);
  if (found === undefined || !(isOwn ? found.readonly : isComplete(found)))
    throw notThere(name, there);
  return found;
}

/** Errors: Failure where btrfs would take different files for one. */
function needComparable(from: Snapshot, to: string, isIt: boolean | undefined): void {
  if (isIt !== true)
    throw new Failure(
      `${from.name} and ${to} cannot be compared: they are not related. Neither was made from the other, nor were both from one subvolume (one can have been received in full), and so btrfs would take different files for one`,
    );
}

/** The difference between a source's newest snapshot and now. Errors: UsageError, Failure. */
async function sinceNewest(folder: Folder): Promise<DifferenceAsked> {
  const { source, host, id, path, place } = folder;
  if (source === null)
    throw new UsageError(
      folder.snapshots.length === 0
        ? `${id} has no snapshots: give a SOURCE that has some (-f says where), or a folder of backups and two names`
        : `${id} is no SOURCE: give two names of what is there`,
    );
  const from = wholeIn(folder).at(-1);
  if (from === undefined)
    throw new Failure(`${id} has no snapshot in ${path} to compare with: the first run takes one`);
  const now = { ...NO_SUBVOLUME, uuid: crypto.randomUUID(), parentUuid: source.uuid };
  // Some old filesystems' top level has no UUID that a snapshot could tell.
  const isUntold = source.uuid === place.filesystem && from.receivedUuid === null;
  const isIt = isUntold || areComparable(from, now, inquiryInto(folder));
  needComparable(from, `${id} as it is now`, isIt);
  await clearCompared(folder);
  const name = `.btrfs-backup.diff-${now.uuid.replaceAll("-", "").slice(0, 16)}`;
  const given = { ...at(folder), source: source.path, name, parent: from.name };
  const what = `${id}: cannot tell what has changed since ${from.name}`;
  return {
    from,
    to: "now",
    read: (take) => askInPieces([host, DIFFERENCE_NOW, given, what], take),
  };
}

/** Deletes what interrupted comparisons left in a source's folder. Errors: Failure. */
async function clearCompared(folder: Folder): Promise<void> {
  const names = comparedIn(folder.standing);
  if (names.length > 0)
    await askAt(folder, CLEAR_COMPARED, { names }, "cannot delete what an interrupted diff left");
}

/**
 * A path of the command line as paths are in a stream: below the subvolume, where it may be given
 * as it is at the source. Errors: UsageError for one that leads out of it.
 */
const pathInside = (path: string, folder: Pick<Folder, "source" | "chain">) =>
  Buffer.from(pathBelow(path, folder)).toString("latin1");

/** The same, as text. */
function pathBelow(path: string, { source, chain }: Pick<Folder, "source" | "chain">): string {
  const plain = withoutSlash(normalize(path));
  const above = [source?.path, chain.owner?.path].find(
    (one) => one !== undefined && isWithin(plain, one),
  );
  const inside = above === undefined ? plain : plain.slice(above.length);
  const below = inside.replace(/^\//, "");
  if (below === ".." || below.startsWith("../"))
    throw new UsageError(`${path} is not below the subvolume: paths begin at its top`);
  return below === "." ? "" : below;
}

/** Whether a path in a stream is another one, or below that. */
const isBelow = (path: string, above: string) =>
  above === "" || path === above || path.startsWith(`${above}/`);

/** What became of a path: its bytes are those that were written, and those that it shares. */
export type Difference = {
  readonly what: "added" | "removed" | "changed" | "renamed";
  /** The bytes of the path, each as a character; the top is the empty one. */
  readonly path: string;
  /** Where it was before, if it is renamed. */
  readonly from: string | null;
  readonly bytes: number;
  /** What it shares with what was there: a copy with --reflink costs nothing. */
  readonly shared: number;
};

// The commands of a stream are followed in a tree of all names that they say: a name that a command
// has made or moved, and on the way to these what stands where it was. A file is written to by its
// path of that moment, be it a name like o257-9-0 that it has until its own is free, or be it below
// a directory that gets another name later: in the tree, a directory moves with all that is below.
// A name in it takes some hundred bytes, whatever the size of the stream.

/** What is told of a file or a directory, by whichever of its names. */
type Touched = {
  readonly isNew: boolean;
  bytes: number;
  shared: number;
  /** Contents or attributes. */
  isChanged: boolean;
  /** Its times, which change with its names as well. */
  isTimed: boolean;
  isMoved: boolean;
};

/** A name in the tree. */
type Spot = {
  name: string;
  above: Spot | null;
  below: Map<string, Spot> | null;
  /** The name that it had in the parent, below what it was in; null for what came since. */
  readonly former: string | null;
  readonly cameFrom: Spot | null;
  touched: Touched | null;
};

const newTouched = (isNew: boolean): Touched => ({
  isNew,
  bytes: 0,
  shared: 0,
  isChanged: false,
  isTimed: false,
  isMoved: false,
});

const touchedOf = (spot: Spot): Touched => (spot.touched ??= newTouched(false));

/** A name that is where it was in the parent. */
const standingSpot = (name: string, above: Spot | null): Spot => ({
  name,
  above,
  below: null,
  former: name,
  cameFrom: above,
  touched: null,
});

/** The path that a name had in the parent. */
function formerPath(spot: Spot): string {
  const names: string[] = [];
  for (let one = spot; one.cameFrom !== null; one = one.cameFrom) names.push(one.former as string);
  return names.reverse().join("/");
}

/** All that a stream has told so far. `gone`: the names of the parent that were taken away. */
function followedTree() {
  const top = standingSpot("", null);
  const gone: Spot[] = [];
  const nowhere = () => new Failure("btrfs send named something that is not there");

  /** What has a name in a directory. */
  function inside(spot: Spot, name: string): Spot {
    const below = (spot.below ??= new Map<string, Spot>());
    const found = below.get(name);
    if (found !== undefined) return found;
    if (spot.former === null) throw nowhere();
    const standing = standingSpot(name, spot);
    below.set(name, standing);
    return standing;
  }
  // One command after the other is about the same directory.
  let last = { path: "", spot: top };
  function directory(path: string): Spot {
    if (path === "") return top;
    if (path !== last.path) last = { path, spot: path.split("/").reduce(inside, top) };
    return last.spot;
  }
  /** The directory of a path, and its name there. */
  function placeOf(path: string): [Spot, string] {
    const slash = path.lastIndexOf("/");
    return [directory(path.slice(0, Math.max(0, slash))), path.slice(slash + 1)];
  }
  const find = (path: string) => (path === "" ? top : inside(...placeOf(path)));
  function put(path: string, spot: Spot): void {
    const [above, name] = placeOf(path);
    above.below ??= new Map();
    spot.above = above;
    spot.name = name;
    above.below.set(name, spot);
  }
  function take(path: string): Spot {
    const spot = find(path);
    if (spot.above === null) throw nowhere();
    spot.above.below?.delete(spot.name);
    if (spot.below !== null) last = { path: "", spot: top };
    touchedOf(spot).isMoved = true;
    return spot;
  }
  const add = (path: string, touched: Touched) =>
    put(path, { ...standingSpot("", null), former: null, touched });
  return {
    top,
    gone,
    find,
    make: (path: string) => add(path, newTouched(true)),
    link(path: string, other: string): void {
      const touched = touchedOf(find(other));
      touched.isMoved = true;
      add(path, touched);
    },
    rename: (path: string, to: string) => put(to, take(path)),
    remove(path: string): void {
      const spot = take(path);
      if (spot.former !== null) gone.push(spot);
    },
  };
}
type FollowedTree = ReturnType<typeof followedTree>;

type Following = (tree: FollowedTree, path: string, told: ToldCommand) => void;
const making: Following = (tree, path) => tree.make(path);
const removing: Following = (tree, path) => tree.remove(path);
const changing: Following = (tree, path) => {
  touchedOf(tree.find(path)).isChanged = true;
};

/** What each command of a stream does to the tree. */
const FOLLOWED_COMMANDS: Readonly<Record<string, Following>> = {
  mkfile: making,
  mkdir: making,
  mknod: making,
  mkfifo: making,
  mksock: making,
  symlink: making,
  unlink: removing,
  rmdir: removing,
  truncate: changing,
  chmod: changing,
  chown: changing,
  set_xattr: changing,
  remove_xattr: changing,
  rename: (tree, path, told) => tree.rename(path, told.text("pathTo")),
  link: (tree, path, told) => tree.link(path, told.text("pathLink")),
  utimes(tree, path) {
    touchedOf(tree.find(path)).isTimed = true;
  },
  update_extent(tree, path, told) {
    changing(tree, path, told);
    touchedOf(tree.find(path)).bytes += told.number("size");
  },
  clone(tree, path, told) {
    changing(tree, path, told);
    touchedOf(tree.find(path)).shared += told.number("cloneLength");
  },
};

/**
 * Reads a difference without data as its bytes come. `parent`: the UUID that it must say of its
 * parent. `finish` tells what differs, by path. Errors: Failure for a stream that is no such.
 */
export function differenceReader(parent: string): {
  readonly feed: (bytes: Buffer) => void;
  readonly finish: () => Difference[];
} {
  const tree = followedTree();
  let isBegun = false;
  const scanner = streamScanner((name, told) => {
    if (name === "end") return;
    if (!isBegun) {
      if (name !== "snapshot") throw new Failure("btrfs send began with something unknown");
      if (told.hexadecimal("cloneUuid") !== parent.replaceAll("-", ""))
        throw new Failure("it is another subvolume now that has the first name");
      isBegun = true;
      return;
    }
    const follow = FOLLOWED_COMMANDS[name];
    if (follow === undefined) throw new Failure(`btrfs send said something unknown: ${name}`);
    follow(tree, told.text("path"), told);
  });
  return {
    feed: scanner.feed,
    finish() {
      scanner.finish();
      return differencesIn(tree);
    },
  };
}

/** A name of this program's own files, whose changes are told nobody. */
const isOwnFile = (path: string) => /(?:^|\/)\.btrfs-backup\.[^/]*$/.test(path);

/** What differs in the end, by path. */
function differencesIn({ top, gone }: FollowedTree): Difference[] {
  const { news, found } = spotsTold(top);
  const leavers = groupBy(gone, ({ touched }) => touched);
  const removed = new Map(gone.map((spot) => [formerPath(spot), spot]));
  // A file is renamed by a second name, and the first one taken away.
  const come = news.map(({ path, spot }) => {
    const left = spot.touched?.isNew ? undefined : leavers.get(spot.touched)?.shift();
    const from = left === undefined ? null : formerPath(left);
    if (from !== null) removed.delete(from);
    return { path, spot, from };
  });
  for (const { path, spot, from } of come)
    if (from !== null && from !== path) found.push({ what: "renamed", path, from, spot });
    else if (from === path || removed.has(path))
      found.push({ what: "changed", path, from: null, spot });
    else found.push({ what: "added", path, from: null, spot });
  const there = new Set(found.map(({ path }) => path));
  for (const [path, spot] of removed)
    if (!there.has(path)) found.push({ what: "removed", path, from: null, spot });
  return toldInOrder(found);
}

/** Differences by path; what has several names is written once. */
const toldInOrder = (found: readonly Found[]) =>
  found
    .filter(({ path }) => !isOwnFile(path))
    .sort((a, b) => (a.path < b.path ? -1 : 1))
    .map(({ what, path, from, spot }): Difference => {
      const written = what === "removed" ? null : spot.touched;
      const { bytes = 0, shared = 0 } = written ?? {};
      if (written !== null) Object.assign(written, { bytes: 0, shared: 0 });
      return { what, path, from, bytes, shared };
    });

type Found = Pick<Difference, "what" | "path" | "from"> & { readonly spot: Spot };

/** The names of the tree that are new, and what is changed or renamed of all others. */
function spotsTold(top: Spot) {
  const [news, found]: [{ path: string; spot: Spot }[], Found[]] = [[], []];
  const open: { path: string; spot: Spot }[] = [{ path: "", spot: top }];
  for (let one = open.pop(); one !== undefined; one = open.pop()) {
    const { path, spot } = one;
    for (const [name, below] of spot.below ?? [])
      open.push({ path: path === "" ? name : `${path}/${name}`, spot: below });
    if (spot.former === null) news.push(one);
    else if (spot.above !== spot.cameFrom || spot.name !== spot.former)
      found.push({ what: "renamed", path, from: formerPath(spot), spot });
    else if (isTold(spot)) found.push({ what: "changed", path, from: null, spot });
  }
  return { news, found };
}

/**
 * Whether something that is where it was has changed. The times of a directory change with the
 * names in it, and those of a file with its own names.
 */
const isTold = ({ touched, below }: Spot) =>
  touched !== null &&
  (touched.isChanged || (touched.isTimed && !touched.isMoved && below === null));

/** The attributes of a command of a send stream. */
type ToldCommand = {
  readonly text: (attribute: ToldAttribute) => string;
  readonly number: (attribute: ToldAttribute) => number;
  readonly hexadecimal: (attribute: ToldAttribute) => string;
};
type ToldAttribute = keyof ReturnType<typeof streamCommands>["attribute"];

/** No command of protocol 1 is longer: BTRFS_SEND_BUF_SIZE_V1 of linux/fs/btrfs/send.h. */
const LONGEST_COMMAND = 65536;

/**
 * Reads the commands of a send stream of protocol 1 as its bytes come, and gives `take` each. Errors:
 * Failure for what is no stream, or ends early.
 */
function streamScanner(take: (name: string, told: ToldCommand) => void) {
  const { commands } = streamCommands();
  const UPDATE_EXTENT = 22; // in place of what writes, without data
  const [BEGINNING, HEADER] = ["btrfs-stream\0\x01\0\0\0", 10];
  const { read, told } = attributeReader();
  let rest: Buffer = Buffer.alloc(0);
  let [isBegun, isOver] = [false, false];
  /** Takes whole commands, and returns where the first other one begins. */
  function takeWhole(bytes: Buffer, from: number): number {
    let here = from;
    while (here + HEADER <= bytes.length) {
      const end = here + HEADER + bytes.readUInt32LE(here);
      const number = bytes.readUInt16LE(here + 4);
      const name = number === UPDATE_EXTENT ? "update_extent" : commands[number]?.name;
      if (isOver || name === undefined || end - here > LONGEST_COMMAND)
        throw new Failure("btrfs send said something unknown");
      if (end > bytes.length) break;
      read(bytes, here + HEADER, end);
      isOver = name === "end";
      take(name, told);
      here = end;
    }
    return here;
  }
  return {
    feed(piece: Buffer): void {
      const bytes = rest.length === 0 ? piece : Buffer.concat([rest, piece]);
      const isEnough = isBegun || bytes.length >= BEGINNING.length;
      if (isEnough && !isBegun && bytes.toString("latin1", 0, BEGINNING.length) !== BEGINNING)
        throw new Failure("btrfs send began with something unknown");
      const done = isEnough ? takeWhole(bytes, isBegun ? 0 : BEGINNING.length) : 0;
      isBegun = isEnough;
      rest = Buffer.from(bytes.subarray(done));
    },
    finish(): void {
      if (!isOver || rest.length > 0) throw new Failure("btrfs send ended early");
    },
  };
}

/** Finds the attributes of one command after the other. */
function attributeReader() {
  const { attribute } = streamCommands();
  let all: Buffer = Buffer.alloc(0);
  const [begins, ends] = [new Int32Array(32), new Int32Array(32)];
  /** The place of an attribute of so many bytes at least. */
  const placeOf = (name: ToldAttribute, least: number) => {
    const [begin, end] = [begins[attribute[name]] as number, ends[attribute[name]] as number];
    if (begin === 0 || end - begin < least) throw new Failure("btrfs send left something out");
    return [begin, end] as const;
  };
  const told: ToldCommand = {
    text: (name) => all.toString("latin1", ...placeOf(name, 0)),
    number: (name) => Number(all.readBigUInt64LE(placeOf(name, 8)[0])),
    hexadecimal: (name) => all.toString("hex", ...placeOf(name, 0)),
  };
  function read(bytes: Buffer, from: number, end: number): void {
    all = bytes;
    begins.fill(0);
    for (let next = from; next < end;) {
      const type = next + 4 <= end ? bytes.readUInt16LE(next) : 0;
      const last = type === 0 ? Infinity : next + 4 + bytes.readUInt16LE(next + 2);
      if (type > 31 || last > end) throw new Failure("btrfs send said something unknown");
      begins[type] = next + 4;
      ends[type] = last;
      next = last;
    }
  }
  return { read, told };
}

/** The bytes and paths below a directory. */
export type DirectorySum = { readonly path: string; bytes: number; shared: number; paths: number };

/** What differs below each directory that something differs below, the most bytes first. */
export function byDirectory(all: readonly Difference[]): DirectorySum[] {
  const sums = new Map<string, DirectorySum>();
  for (const { path, bytes, shared } of all)
    for (let above = path; above !== "" || path === "";) {
      above = above.slice(0, Math.max(0, above.lastIndexOf("/")));
      const sum = sums.get(above) ?? { path: above, bytes: 0, shared: 0, paths: 0 };
      sum.bytes += bytes;
      sum.shared += shared;
      sum.paths++;
      sums.set(above, sum);
      if (above === "") break;
    }
  return [...sums.values()].sort(
    (a, b) => b.bytes - a.bytes || b.paths - a.paths || (a.path < b.path ? -1 : 1),
  );
}

/** The directories with a hundredth of all bytes, or of all paths. */
export function largestOf(sums: readonly DirectorySum[]): readonly DirectorySum[] {
  const top = sums.find(({ path }) => path === "");
  if (top === undefined) return [];
  return sums.filter(
    ({ bytes, paths }) => (bytes > 0 && bytes * 100 >= top.bytes) || paths * 100 >= top.paths,
  );
}

/** A stream's path as people read it, on one line. */
const shownPath = (path: string) =>
  path === "" ? "." : Buffer.from(path, "latin1").toString().replaceAll("\n", "\\u000a");

/** A stream's path in an event, with its bytes in base64 where they are no text. */
function toldPath(path: string) {
  const bytes = Buffer.from(path, "latin1");
  const text = bytes.toString();
  const isExact = Buffer.from(text).equals(bytes);
  return { path: text, ...(isExact ? {} : { raw: bytes.toString("base64") }) };
}

function showDifferences(
  all: readonly Difference[],
  { json }: Pick<DiffOptions, "json">,
  report: Report,
): void {
  let lines: string[] = [];
  for (const { what, path, from, bytes, shared } of all) {
    const was = from === null ? {} : { from: toldPath(from).path };
    report.event("difference", { what, ...toldPath(path), ...was, bytes, shared });
    const names = from === null ? shownPath(path) : `${shownPath(from)} -> ${shownPath(path)}`;
    const written = what === "removed" ? "-" : inBytes(bytes);
    if (!json) lines.push(`${what.padEnd(7)}  ${written.padStart(7)}  ${names}\n`);
    if (lines.length < 10_000) continue;
    print(lines.join(""));
    lines = [];
  }
  print(lines.join(""));
}

function showDirectories(
  all: readonly Difference[],
  { json }: Pick<DiffOptions, "json">,
  report: Report,
): void {
  const sums = byDirectory(all);
  for (const { path, ...sum } of sums) report.event("directory", { ...toldPath(path), ...sum });
  const shown = largestOf(sums);
  if (json || shown.length === 0) return;
  const cells = shown.map(({ path, bytes, paths }) => [
    inBytes(bytes).padStart(7),
    String(paths).padStart(7),
    shownPath(path),
  ]);
  print(alignedTable([["WRITTEN", "  PATHS", "DIRECTORY"], ...cells]));
  const left = sums.length - shown.length;
  if (left > 0)
    log.info(
      `${left} smaller ${left === 1 ? "directory has" : "directories have"} less than 1 % each; --json tells all`,
    );
}

/** Tells how much differs in all. */
function tellTotals(
  all: readonly Difference[],
  { from, to, paths }: { from: string; to: string } & Pick<DiffOptions, "paths">,
  report: Report,
): void {
  const sums = { added: 0, removed: 0, changed: 0, renamed: 0, bytes: 0, shared: 0 };
  for (const { what, bytes, shared } of all) {
    sums[what]++;
    sums.bytes += bytes;
    sums.shared += shared;
  }
  const counts = (["added", "removed", "changed", "renamed"] as const)
    .filter((what) => sums[what] > 0)
    .map((what) => `${sums[what]} ${what}`);
  const more = sums.shared > 0 ? `, and ${inBytes(sums.shared)} shared with what was there` : "";
  // Be it that a path is misspelt: nobody is told that nothing differs at all.
  const none = `nothing differs${paths.length === 0 ? "" : ` at or below ${paths.map(shellWord).join(", ")}`}`;
  log.info(
    `From ${from} to ${to}: ${counts.length === 0 ? none : `${counts.join(", ")}; ${inBytes(sums.bytes)} written${more}`}`,
  );
  report.event("summary", { ok: !report.failed, from, to, ...sums });
}

// ── unpin: destinations, forgotten ──

export type UnpinOptions = Pick<
  RunOptions,
  "source" | "snapshotFolder" | "prefix" | "hosts" | "wait"
> & { readonly locations: readonly string[]; readonly all: boolean };

/** Makes a source forget destinations, so that nothing is kept for them. */
export async function unpin(o: UnpinOptions, report: Report): Promise<void> {
  const source = await openFinished({
    ...o,
    dryRun: false,
    adopt: false,
    fsChecks: true,
    recursive: false,
    member: null,
  });
  try {
    if (source.record.unreadable !== null) {
      const record = `${source.path}/.btrfs-backup.json`;
      if (!o.all)
        throw new Failure(
          `${record} cannot be read (${source.record.unreadable}); --all moves it aside`,
        );
      const suffix = stamp(new Date());
      await ask(source.host, ASIDE, { ...at(source), suffix }, `cannot move ${record} aside`);
      log.info(`Moved ${record} to .btrfs-backup.json.${suffix}`);
      return report.event("summary", { ok: true });
    }
    const known = knownDestinations(source);
    const ids = known.map(({ location }) => location);
    for (const id of o.locations)
      if (!ids.includes(id))
        tellFailure(
          report,
          id,
          `not known at ${o.source.id}; known are: ${ids.join(", ") || "none"}`,
        );
    const destinations = known.filter(({ location }) => !o.all && !o.locations.includes(location));
    await writeRecord(source, { ...source.owned, destinations });
    log.info(`Unpinned ${plural(known.length - destinations.length, "destination")}`);
    for (const id of ids)
      if (o.all || o.locations.includes(id)) report.event("unpin", { destination: id });
    report.event("summary", { ok: !report.failed });
  } finally {
    await whileCleaning(source.close);
  }
}

// ── keep, release: what no retention deletes ──

export type KeepOptions = LookOptions & {
  readonly wait: number;
  readonly location: Readable;
  readonly name: string;
  readonly note: string;
};

/** Keeps a snapshot or backup until it is released; once more, the note is replaced. */
export async function keep(o: KeepOptions, report: Report): Promise<void> {
  const { name, note } = o;
  await changeKept(o, "keep", async (folder, found) => {
    if (folder.store !== null) await markStreams(folder, folder.store, found, note);
    else {
      const ones = found.map((one) => ({ name, uuid: dataOf(one), note }));
      const others = otherKept(folder, found);
      await writeRecord(folder, { ...folder.chain, kept: [...others, ...ones] });
    }
    log.info(`Kept ${name} in ${folder.id}: no retention there deletes it until it is released`);
    report.event("keep", { location: folder.id, name, note });
  });
  report.event("summary", { ok: !report.failed });
}

/** Leaves to retention again what was kept. What is not kept is told, and no failure. */
export async function releaseKept(o: KeepOptions, report: Report): Promise<void> {
  const { name } = o;
  await changeKept(o, "release", async (folder, found) => {
    const kept = found.filter((one) => one.kept !== undefined);
    if (kept.length === 0) {
      log.info(`${name} in ${folder.id} is not kept: there is nothing to release`);
      return;
    }
    if (folder.store !== null) {
      const objects = kept.map(({ uuid }) => uuid + KEPT_MARK);
      const given = { lock: keptLock(folder), objects };
      await askAt(folder, folder.store.verbs.drop, given, `cannot release ${name}`);
    } else await writeRecord(folder, { ...folder.chain, kept: otherKept(folder, found) });
    log.info(`Released ${name} in ${folder.id}: retention there may delete it again`);
    report.event("release", { location: folder.id, name });
  });
  report.event("summary", { ok: !report.failed });
}

/** What a folder's record keeps besides these. */
function otherKept({ chain }: Folder, these: readonly Entry[]): readonly KeptOne[] {
  const data = new Set(these.map(dataOf));
  return (chain.kept ?? []).filter(({ uuid }) => !data.has(uuid));
}

/** What the verbs of a store lock for a change of what is kept, as for a deletion without a source. */
const keptLock = ({ id, prefix, store }: Folder) =>
  store?.verbs.isDirectory === false ? lockFile(`${id}\n${prefix}`) : prefix;

/** Writes an object with the note beside each stream. */
async function markStreams(
  folder: Folder,
  store: Store,
  found: readonly Entry[],
  note: string,
): Promise<void> {
  for (const { uuid } of found) {
    const object = uuid + KEPT_MARK;
    const given = { lock: keptLock(folder), object, text: JSON.stringify([uuid, note]) };
    await askAt(folder, store.verbs.keep, given, `cannot keep ${uuid}`);
  }
}

/**
 * Opens the place of a name, locked, for a change of what is kept there: a stream by its snapshot
 * or its own name. Errors: Failure where nothing complete has that name, UsageError.
 */
async function changeKept(
  o: KeepOptions,
  verb: "keep" | "release",
  change: (folder: Folder, found: readonly Entry[]) => Promise<void>,
): Promise<void> {
  const prefix = o.prefix ?? prefixOf(STREAM.exec(o.name)?.[1] ?? o.name) ?? "";
  const looked = await openLocation(o.location, { ...o, prefix, wait: "look" });
  const namedIn = (folder: Folder) => {
    const own = isSnapshotFolder(folder);
    const isWhole = (one: Entry) => (own ? one.readonly : isComplete(one));
    return folder.snapshots.filter(
      (one) =>
        (one.name === o.name || (folder.store !== null && one.uuid === o.name)) &&
        (isWhole(one) || (verb === "release" && one.kept !== undefined)),
    );
  };
  const folder = await openChecked(
    o.location,
    looked.path,
    {
      prefix,
      wait: o.wait,
      hosts: o.hosts,
      ...(looked.source === null ? {} : { source: looked.source.path }),
    },
    (opened) => {
      if (opened.store === null) needRoot(opened, verb === "keep" ? "keeping" : "releasing");
      if (namedIn(opened).length === 0) throw notThere(o.name, opened);
      const { unreadable } = opened.record;
      if (opened.store === null && unreadable !== null)
        throw new Failure(
          `${opened.path}/.btrfs-backup.json cannot be read (${unreadable}), where it is written what is kept; nothing is deleted there as long as that is so`,
        );
    },
  );
  try {
    await change(folder, namedIn(folder));
  } finally {
    await whileCleaning(folder.close);
  }
}

/** The error for a name that nothing complete has, with the nearest that there are. */
function notThere(name: string, { id, standing, prefix }: Folder): Failure {
  const alike = (other: string) => {
    const differs = [...other].findIndex((letter, i) => letter !== name[i]);
    return differs === -1 ? other.length : differs;
  };
  const names = new Set<string>(
    standing.filter((one) => prefixOf(one.name) !== null && one.readonly).map((one) => one.name),
  );
  const near = [...names].sort((a, b) => alike(b) - alike(a) || (a < b ? 1 : -1)).slice(0, 3);
  const hint = near.length === 0 ? "nothing complete is there" : `near it: ${near.join(", ")}`;
  const isOther = names.has(name) ? ` of the prefix ${JSON.stringify(prefix)}` : "";
  return new Failure(`${id} has no complete snapshot ${name}${isOther}; ${hint}`);
}

/** A store with the notes of what is kept in it. That they cannot be read is only a warning. */
async function withNotes(folder: Folder, report: Report): Promise<Folder> {
  const { id, host, store, snapshots } = folder;
  const marks = snapshots.flatMap(({ uuid, kept }) => (kept === undefined ? [] : uuid + KEPT_MARK));
  if (store === null || marks.length === 0) return folder;
  const notes = new Map<string, string>();
  const problem = `${id}: cannot read the notes of what is kept`;
  try {
    for (const objects of inArguments(marks)) {
      const given = { ...at(folder), how: "", holder: "", objects };
      for (const line of (await ask(host, store.verbs.fetch, given, problem)).split("\n")) {
        const [object, note] = parseNoteLine(line);
        notes.set(object, shownNote(note));
      }
    }
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    report.warning(error.message);
  }
  const noted = snapshots.map((one) =>
    one.kept === undefined ? one : { ...one, kept: notes.get(one.uuid) ?? "" },
  );
  return { ...folder, snapshots: noted };
}

/** A stream's name and its note, as `keep` wrote them; nothing of any other line. */
function parseNoteLine(line: string): [object: string, note: string] {
  try {
    const [object, note] = JSON.parse(line) as unknown[];
    return typeof object === "string" && typeof note === "string" ? [object, note] : ["", ""];
  } catch {
    return ["", ""];
  }
}

// ── check: whether the next run would do its work ──

type Level = "ok" | "warn" | "fail";

/** What was found of one thing; `mend` is the command that mends it. */
type Finding = {
  readonly level: Level;
  readonly about: string;
  readonly place: string;
  readonly message: string;
  readonly mend: string | null;
};

/** Tells whether the next run of the same command line would do its work, and changes nothing. */
export async function checkRun(o: RunOptions, report: Report): Promise<void> {
  const told = new Set<string>();
  const checkup: Checkup = {
    o,
    tell(finding) {
      const { level, about, place, message, mend } = finding;
      const line = `${place}: ${message}`;
      if (told.has(line)) return false;
      told.add(line);
      if (level === "fail") report.failed = true;
      report.event("finding", finding);
      report.tally[level] = (report.tally[level] ?? 0) + 1;
      const isHeard = level !== "ok" || setting().level >= LEVELS.info;
      const what = `${level.padEnd(4)}  ${about.padEnd(11)}  ${line}${mend === null ? "" : `; mend: ${mend}`}`;
      if (isHeard && !o.json) print(`${what.replaceAll("\n", " ")}\n`);
      return true;
    },
  };
  const session = await sessionToCheck(checkup);
  if (session !== null) {
    await checkOpenedSource(checkup, session);
    const rate = await newestRate(checkup, session);
    await checkSpace(checkup, session.source, rate);
    for (const [id, one] of session.wanted)
      await checkOneDestination(
        checkup,
        session,
        { ...one, id, known: session.known.get(id) },
        rate,
      );
    await whileCleaning(session.source.close);
  }
  const { ok = 0, warn = 0, fail = 0 } = report.tally;
  report.event("summary", { ok: !report.failed, good: ok, warnings: warn, failures: fail });
}

/** What the looks of one check share. */
type Checkup = {
  readonly o: RunOptions;
  /** Tells what is not told yet, and returns whether it was not. */
  readonly tell: (finding: Finding) => boolean;
};

/** A verb's words where a guarded key may not run it. */
const KEY_REFUSED = "btrfs-backup guard: refused";

/** One look at one thing of a place. */
type Look = {
  readonly about: string;
  readonly id: string;
  readonly location: Location;
};

/**
 * Looks at one thing. What the work reports to `heard`, or throws, is told, each with its level;
 * else what it returns is told as good. Errors: Interrupted.
 */
async function look(
  checkup: Checkup,
  { about, id, location }: Look,
  work: (heard: Report) => Promise<string | null> | string | null,
): Promise<void> {
  let isGood = true;
  const tell = (level: Level, place: string, text: string) => {
    const message = text.startsWith(`${place}: `) ? text.slice(place.length + 2) : text;
    const mend = mendFor(message, { level, source: checkup.o.source.id, location });
    if (checkup.tell({ level, about, place, message, mend })) isGood = false;
  };
  const heard: Report = {
    ...newReport(false, true),
    event(name, { message }) {
      if (name === "skipped") tell("warn", id, `not there, as it may be: ${String(message)}`);
    },
    warning: (message) => tell("warn", id, message),
    error(destination, error) {
      if (error instanceof Interrupted) throw error;
      if (error instanceof AlreadyTold) return;
      const message = error instanceof UsageError ? error.message : messageOf(error);
      const isRefused = !["source", "destination"].includes(about) && message.includes(KEY_REFUSED);
      tell(isRefused ? "warn" : "fail", destination ?? id, message);
    },
  };
  try {
    const good = await work(heard);
    if (isGood && good !== null)
      checkup.tell({ level: "ok", about, place: id, message: good, mend: null });
  } catch (error) {
    heard.error(null, error);
  }
}

/** What a mend depends on. */
type Mending = { readonly level: Level; readonly source: string; readonly location: Location };

/** Words of warnings and errors, each with the command that mends it. */
const MENDS: readonly (readonly [
  RegExp,
  (found: readonly string[], at: Mended) => string | null,
])[] = [
  [/ not found: install (\S+)/, ([, name = ""], { on }) => `${on}apt install ${name}`],
  [/"(btrfs-backup (?!help )[^"]+)"/, ([, words = ""]) => plainCommand(words)],
  [/(mkdir -p [^)]+)\)/, ([, words = ""], { on }) => plainCommand(on + words)],
  [
    /others can change (.*?), and could/,
    ([, path = ""], { on }) =>
      `${on}chown root ${shellWord(path)} && ${on}chmod go-w ${shellWord(path)}`,
  ],
  [
    /^(\S+) is not sent: /,
    ([, name = ""], { on, path }) =>
      `${on}mv ${shellWord(`${path}/${name}`)} ${shellWord(`${path}/${name}.other`)}`,
  ],
  [/is the disk mounted/, (_, { on, path }) => `${on}mount ${shellWord(path)}`],
  [/--adopt|belong to/, (_, { again }) => `btrfs-backup --adopt ${again}`],
  [/need(s|ing)? root/, (_, { again }) => `sudo btrfs-backup check ${again}`],
  [UNREACHABLE, (_, { on }) => `${on}true`],
  [/Permission denied \(|Host key/, (_, { on }) => `${on}true`],
];
type Mended = { readonly on: string; readonly path: string; readonly again: string };

/** A command that a message holds, if it is no more than one: another host may have said it. */
const plainCommand = (words: string) =>
  /[;&|<>()$`"\\\n*?#!{}]/.test(words.replaceAll(/'[^']*'/g, "")) ? null : words;

/** The command that mends what a message says; a failure that has none is told by a dry run. */
export function mendFor(message: string, { level, source, location }: Mending): string | null {
  const host = "host" in location ? location.host : null;
  const port = host?.port == null ? "" : `-p ${host.port} `;
  const user = host?.user == null ? "" : `${host.user}@`;
  const again = [...new Set([source, location.id])].map(shellWord).join(" ");
  const mending = {
    on: host === null ? "" : `ssh ${port}${shellWord(user + host.name)} `,
    path: "path" in location ? location.path : "",
    again,
  };
  for (const [words, mend] of MENDS) {
    const found = words.exec(message);
    const command = found && mend(found, mending);
    if (command !== null) return command;
  }
  return level === "fail" ? `btrfs-backup --dry-run ${again}` : null;
}

/** A dry run's session of SOURCE; null where a run would refuse it, which is told. */
async function sessionToCheck(checkup: Checkup): Promise<Session | null> {
  const { o } = checkup;
  const { source: location } = o;
  const { id } = location;
  let session: Session | null = null;
  await look(checkup, { about: "source", id, location }, async (heard) => {
    checkPlaces(o);
    const source = await openSource(o);
    session = newSession(source, new Map(), o, heard);
    const all = plural(session.snapshots.length, "snapshot");
    return source.exists ? `${all} in ${source.path}` : `the first run makes ${source.path}`;
  });
  return session;
}

/** Tells of the subvolumes below SOURCE, and warns of those that no run has snapshots of yet. */
function tellOfMembers({ o, source }: Session, heard: Report): string {
  const members = membersIn(source, o);
  const own = membersWithFolders(members, source.subvolumes, o);
  const known = new Set(membersBelow(source, o.prefix));
  const fresh = [...members.keys()].filter((path) => !known.has(path) && !own.has(path));
  if (fresh.length > 0)
    heard.warning(
      `${plural(fresh.length, "subvolume")} below it ${fresh.length === 1 ? "has" : "have"} no snapshot yet: ${someOf(fresh, 3)}`,
    );
  const gone = [...goneFrom(source, members, o.prefix).keys()];
  const went = gone.length === 0 ? "" : `; not there any more: ${someOf(gone, 3)}`;
  return `${plural(members.size, "subvolume")} below it ${members.size === 1 ? "is" : "are"} backed up with it${went}`;
}

/** Looks at all that concerns SOURCE alone. */
async function checkOpenedSource(checkup: Checkup, session: Session): Promise<void> {
  const { o, source } = session;
  const { id } = o.source;
  const about = (word: string): Look => ({ about: word, id, location: o.source });
  const levels = o.destinations.some(({ sending }) => sending.level !== "");
  await checkHost(checkup, about("tools"), source, ["btrfs", "flock", ...(levels ? ["zstd"] : [])]);
  await checkFenceAt(checkup, about("fence"), source);
  await checkLock(checkup, about("lock"), source);
  await look(checkup, about("record"), (heard) => checkSourceRecord(checkup, session, heard));
  await look(checkup, about("nested"), (heard) => {
    warnOfNested(source, { o, report: heard });
    return o.recursive ? tellOfMembers(session, heard) : "no subvolume is left out";
  });
  await checkDuplicates(checkup, about("duplicates"), source);
  await look(checkup, about("snapshots"), (heard) => {
    warnOfSource({ ...session, report: heard });
    return ageOfNewest(session.snapshots, o, heard, "snapshot");
  });
  const { importFrom } = o;
  if (importFrom !== null)
    await look(checkup, about("import"), async () => {
      const { dir, plan } = await importPlanned(session, importFrom);
      return `${plural(plan.coming.length, "snapshot")} to take over from ${dir}`;
    });
  await look(checkup, about("edited"), (heard) => checkEdited(session, heard));
  await look(checkup, about("leftovers"), (heard) => {
    const left = source.subvolumes
      .map(({ path }) => `/${path}`)
      .filter((path) => path.startsWith(`${source.source?.top}.restoring-`));
    if (left.length > 0)
      heard.warning(`an interrupted restore left ${someOf(left, 3)}; the next restore goes on`);
    return "none";
  });
  if (source.host.ssh === null)
    await look(checkup, about("timer"), (heard) => checkTimers(source, heard));
}

/** Looks at the tools of a place's host, and so whether the host answers. */
const checkHost = (checkup: Checkup, what: Look, folder: Folder, programs: readonly string[]) =>
  look(checkup, what, async () => {
    const given = { programs: [...programs] };
    const told = await ask(
      plainHost(folder.host),
      TOOLS,
      given,
      `${folder.id}: cannot ask for tools`,
    );
    const tools = parseTools(told).join(", ");
    return folder.host.ssh === null ? tools : `${folder.host.label} is reached: ${tools}`;
  });

/** The names and versions in what `tools` printed. */
export function parseTools(text: string): string[] {
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => {
      const [name = ""] = line.split(" ");
      return `${name} ${/\d+\.\d+[\w.-]*/.exec(line.slice(name.length))?.[0] ?? "(of an unknown version)"}`;
    });
}

const fenceInWords = (folder: Folder) =>
  folder.fenced
    ? "verbs work in a mount namespace of their own"
    : "no mount namespace can be had, and the place is ours alone";

const checkFenceAt = (checkup: Checkup, what: Look, folder: Folder) =>
  look(checkup, what, () => {
    needOurs(folder, folder.id);
    return fenceInWords(folder);
  });

const checkDuplicates = (checkup: Checkup, what: Look, folder: Folder) =>
  look(checkup, what, (heard) => {
    warnOfDuplicates(folder, heard);
    return "no two subvolumes have one received UUID";
  });

/** Looks who has a folder's locks open, and so neither takes one nor waits. */
const checkLock = (checkup: Checkup, what: Look, folder: Folder) =>
  look(checkup, what, async () => {
    if (!folder.exists) return null;
    const given = { prefix: folder.prefix };
    const found = await askAt(folder, AT_WORK, given, "cannot tell whether a run is at work");
    const processes = [...new Set(found.split("\n").filter(Boolean))];
    if (processes.length === 0) return "no run is at work";
    const { label } = folder.host;
    const where = label === "" ? "" : `ssh ${shellWord(label)} `;
    checkup.tell({
      level: "warn",
      about: what.about,
      place: what.id,
      message: `a run is at work there, or waits (${processes.length === 1 ? "process" : "processes"} ${processes.join(", ")})`,
      mend: `${where}ps -o pid,etime,args -p ${processes.join(",")}`,
    });
    return null;
  });

/** Whether SOURCE's record can be read and is believed, and names no destination that nobody serves. */
function checkSourceRecord(checkup: Checkup, session: Session, heard: Report): string {
  const { o, source, known, wanted } = session;
  tellUnreadable(session, heard);
  const doubt = whyNotBelieved(source);
  if (doubt !== null && known.size > 0)
    heard.warning(`${doubt}: its destinations are used only where they are named`);
  for (const [id, { pin }] of known)
    if (!wanted.has(id))
      checkup.tell({
        level: "warn",
        about: "record",
        place: o.source.id,
        message: `the known destination ${id} is not named: ${pin === null ? "it shares nothing" : `${pin.name} is kept for it`}`,
        mend: `btrfs-backup unpin ${shellWord(o.source.id)} ${shellWord(id)}`,
      });
  return `it can be read, and names ${plural(known.size, "destination")}`;
}

/** Tells the age of the newest of some snapshots; one that --max-age calls too old is an error. */
function ageOfNewest(
  all: readonly Snapshot[],
  { maxAge }: Pick<RunOptions, "maxAge">,
  heard: Report,
  noun: string,
): string {
  const now = Date.now();
  const [newest] = all
    .filter(({ moment }) => moment < now + DURATION.d)
    .sort((a, b) => b.moment - a.moment);
  if (newest === undefined) {
    heard.warning(`there is no ${noun} yet`);
    return "";
  }
  const age = `the newest ${noun} is ${newest.name}, ${inWords(now - newest.moment)} old`;
  if (maxAge !== null && newest.moment < momentBefore(now, maxAge.count, maxAge.unit))
    heard.error(null, new Failure(`${age} (at most ${maxAge.text})`));
  return age;
}

/** Looks for snapshots that were changed after they were taken. */
async function checkEdited(session: Session, heard: Report): Promise<string> {
  const { inquiry, snapshots, known, source } = session;
  const cleared = Object.assign({}, ...[...known.values()].map((one) => one.cleared)) as Cleared;
  const open = snapshots.filter((one) => changedSince(one, inquiry, cleared) === undefined);
  await learnOfParents(inquiry, open, []);
  const [first, ...more] = snapshots.filter((one) => changedSince(one, inquiry, cleared));
  if (first !== undefined)
    heard.warning(
      `${first.name}${more.length > 0 ? ` and ${plural(more.length, "other")}` : ""} may have been edited after it was taken; "btrfs-backup verify --snapshot ${shellWord(first.name)} ${shellWord(source.id)} DEST" compares`,
    );
  return "no snapshot was changed since it was taken";
}

/** Looks what starts a run here: timers of systemd, and files of cron. */
async function checkTimers(source: Folder, heard: Report): Promise<string> {
  const host = plainHost(source.host);
  const told = await ask(host, TIMERS, { name: "btrfs-backup" }, "cannot look for timers");
  const { timers, failed, files } = parseTimers(told);
  for (const unit of failed)
    heard.error(null, new Failure(`${unit} failed when it ran last; see "journalctl -u ${unit}"`));
  const twice = timersTwice(timers);
  if (twice.length > 0)
    heard.warning(
      `btrfs-backup.timer runs every argument file, and ${twice.join(", ")} once more: "systemctl disable --now ${twice.join(" ")}"`,
    );
  for (const { unit, isActive } of timers)
    if (!isActive) heard.warning(`${unit} is not active: "systemctl enable --now ${unit}"`);
  if (timers.length + files.length === 0)
    heard.warning("neither a timer of systemd nor a file of cron names btrfs-backup");
  return [
    ...timers.map(({ unit, last }) => `${unit}, which ran last: ${last || "never"}`),
    ...files,
  ].join("; ");
}

/** The timers of single argument files, where the one for all of them is active as well. */
export function timersTwice(timers: ReturnType<typeof parseTimers>["timers"]): string[] {
  const active = timers.filter(({ isActive }) => isActive).map(({ unit }) => unit);
  if (!active.includes("btrfs-backup.timer")) return [];
  return active.filter((unit) => unit.startsWith("btrfs-backup@"));
}

/** Reads what `timers` printed: units of systemd as blocks of fields, and files of cron. */
export function parseTimers(text: string) {
  const [units = "", cron = ""] = text.split(/^cron$/m);
  const all = units.split(/\n\n+/).map((block) => {
    const field = (name: string) => new RegExp(`^${name}=(.*)$`, "m").exec(block)?.[1] ?? "";
    return {
      unit: field("Id"),
      last: field("LastTriggerUSec").replace("n/a", ""),
      isActive: field("ActiveState") === "active",
      isFailed: field("ActiveState") === "failed" || !["", "success"].includes(field("Result")),
    };
  });
  return {
    timers: all
      .filter(({ unit }) => unit.endsWith(".timer"))
      .map(({ unit, last, isActive }) => ({ unit, last, isActive })),
    failed: all.filter(({ isFailed }) => isFailed).map(({ unit }) => unit),
    files: cron.split("\n").filter(Boolean),
  };
}

/** How many bytes the newest difference had, and the ms that it took to come about. */
type Rate = { readonly bytes: number; readonly span: number };

/** The rate of the newest difference; null where there is none, or it cannot be asked for. */
async function newestRate(
  checkup: Checkup,
  { o, source, snapshots }: Session,
): Promise<Rate | null> {
  const [parent, snapshot] = snapshots.slice(-2);
  if (parent === undefined || snapshot === undefined || source.alone) return null;
  let rate: Rate | null = null;
  const { id } = source;
  await look(checkup, { about: "space", id, location: o.source }, async () => {
    const bytes = await streamBytes(source, { snapshot, parent });
    rate = { bytes, span: Math.max(1000, snapshot.moment - parent.moment) };
    return null;
  });
  return rate;
}

/** So many days a place should last. */
const LASTS_DAYS = 14;

/** For how long so many free bytes last at a rate, in words, and whether that is too short. */
export function lasting(free: number, rate: Rate | null): { short: boolean; message: string } {
  const bytes = `${inBytes(free)} are free`;
  if (rate === null) return { short: false, message: `${bytes}; there is no difference yet` };
  const newest = `the newest difference, ${inBytes(rate.bytes)} in ${inWords(rate.span)}`;
  const span = (free / Math.max(1, rate.bytes)) * rate.span;
  return {
    short: span < LASTS_DAYS * DURATION.d,
    message: `${bytes}, for ${inWords(span)} at the rate of ${newest}`,
  };
}

const checkSpace = (checkup: Checkup, folder: Folder, rate: Rate | null) => {
  const { o } = checkup;
  const isSource = folder.source !== null;
  const found = lasting(folder.place.free, rate);
  const place = shellWord(folder.id);
  const keeping = isSource ? `--dry-run -N POLICY ${place}` : `prune --dry-run -n POLICY ${place}`;
  if (folder.place.free === Infinity) return;
  checkup.tell({
    level: found.short ? "warn" : "ok",
    about: "space",
    place: isSource ? o.source.id : folder.id,
    message: found.message,
    mend: found.short ? `btrfs-backup ${keeping}` : null,
  });
};

/** Looks at one destination, as a dry run opens it. */
async function checkOneDestination(
  checkup: Checkup,
  session: Session,
  asked: Asked,
  rate: Rate | null,
): Promise<void> {
  const { o, source } = session;
  const { id, location, sending } = asked;
  const about = (word: string): Look => ({ about: word, id, location });
  // Opened once: for what is told of the place here, and for the run's own checks.
  const opening = isReadable(location)
    ? openFolder(location, location.path, destinationOpening(o))
    : null;
  const folder = (await opening?.catch(() => null)) ?? null;
  const begun =
    opening === null ? [] : [[id, { folder: opening, go() {}, drop: async () => {} }] as const];
  if (folder !== null) await checkDuplicates(checkup, about("duplicates"), folder);
  let destination: Destination | null = null;
  await look(checkup, about("destination"), async (heard) => {
    const own = { ...session, report: heard, ahead: new Map(begun) };
    try {
      if (!isReadable(location)) checkFilters(source, sending);
      destination = await openDestination(own, asked);
    } catch (error) {
      if (!(error instanceof Absent && asked.optional)) throw error;
      skip(own, asked, error);
      return null;
    }
    if (destination.frozen !== null)
      heard.error(null, new Failure(`nothing is deleted there: ${destination.frozen}`));
    if (!isReadable(location)) return `a command; last served: ${asked.known?.last ?? "never"}`;
    return folder?.exists ? "it is the place that it was" : "the first run makes it";
  });
  if (folder !== null) await checkPlaceOf(checkup, session, { asked, folder, rate });
  if (destination !== null) {
    await checkBackupsOf(checkup, session, { asked, folder, destination });
    await whileCleaning((destination as Destination).close);
  } else await whileCleaning(async () => folder?.close());
}

/** A destination's folder that could be looked at, whether or not a run would accept it. */
type Looked = { readonly asked: Asked; readonly folder: Folder; readonly rate: Rate | null };

/** Tells where the next run would delete backups for space. */
function checkMinFree(checkup: Checkup, { id, place }: Folder, minFree: MinFree): void {
  const wanted = freeOf(minFree, place.size);
  if (place.free >= wanted) return;
  const what = `--min-free ${minFree.text}`;
  const words = [what, `--min-keep ${minFree.newest}`, shellWord(id)].join(" ");
  const [level, ends] =
    wanted > place.size
      ? (["fail", `the filesystem has only ${inBytes(place.size)}`] as const)
      : (["warn", "the next run deletes the oldest backups beyond -n"] as const);
  const message = `${what}: ${inBytes(place.free)} are free, and ${inBytes(wanted)} should be: ${ends}`;
  const mend = level === "warn" ? `btrfs-backup prune --dry-run ${words}` : null;
  checkup.tell({ level, about: "space", place: id, message, mend });
}

/** Looks at the host, the locks and the disk of a destination. */
async function checkPlaceOf(
  checkup: Checkup,
  { source }: Session,
  { asked: { id, location, sending, minFree }, folder, rate }: Looked,
): Promise<void> {
  const about = (word: string): Look => ({ about: word, id, location });
  const programs = [
    ...(location.kind === "rclone" ? ["rclone"] : ["flock"]),
    ...(location.kind === "folder" ? ["btrfs"] : []),
    ...(sending.level !== "" ? ["zstd"] : []),
  ];
  await checkHost(checkup, about("tools"), folder, programs);
  if (sending.recipients.length > 0)
    await checkHost(checkup, about("tools"), { ...folder, host: LOCAL }, ["gpg"]);
  if (!isDirectory(location)) return;
  await checkFenceAt(checkup, about("fence"), folder);
  await checkLock(checkup, about("lock"), folder);
  await checkSpace(checkup, folder, rate);
  if (minFree !== null) checkMinFree(checkup, folder, minFree);
  if (!sameHost(folder.host, source.host)) return;
  await look(checkup, about("disk"), async (heard) => {
    const [here, there] = [await disksOf(folder), await disksOf(source)];
    const shared = here.filter((one) => there.includes(one));
    if (shared.length > 0)
      heard.warning(`it lies on a disk of SOURCE (${shared.join(", ")}), and is lost with it`);
    return here.length > 0 ? `on ${here.join(", ")}, where SOURCE is not` : null;
  });
}

/** The block devices that a place's filesystem lies on, down to the disks. */
async function disksOf(folder: Folder): Promise<string[]> {
  const { device } = placeOn(folder.mounts, folder.place.path).mount;
  const given = { filesystem: folder.place.filesystem ?? "", device };
  const host = plainHost(folder.host);
  const told = await ask(host, DISKS, given, `${folder.id}: cannot tell on which disk it is`);
  return [...new Set(told.split("\n").map((line) => line.trim()))].filter(Boolean);
}

type Opened = {
  readonly asked: Asked;
  readonly folder: Folder | null;
  readonly destination: Destination;
};

/** Looks at what stands at a destination. */
async function checkBackupsOf(
  checkup: Checkup,
  session: Session,
  { asked, folder, destination }: Opened,
): Promise<void> {
  const { id, location } = asked;
  const { standing } = destination;
  const about = (word: string): Look => ({ about: word, id, location });
  await look(checkup, about("leftovers"), (heard) => {
    const left = [...standing.obstacles].filter(([, { kind }]) => kind === "leftover");
    if (left.length > 0)
      heard.warning(
        `a broken transfer left ${someOf(
          left.map(([name]) => name),
          3,
        )}; the next run removes it, and sends it again`,
      );
    const parts = [...(folder?.entries ?? [])].filter((name) => PART.test(name));
    if (parts.length > 0)
      heard.warning(
        `${plural(parts.length, "part")} of a broken transfer ${parts.length === 1 ? "is" : "are"} kept there; the next run with --resume goes on, any other removes ${parts.length === 1 ? "it" : "them"}`,
      );
    return "none";
  });
  await look(checkup, about("backups"), async (heard) => {
    const served = toServe({ ...session, report: heard }, destination, asked);
    const { transfers, conflicts } = await planFor(served);
    for (const conflict of conflicts) heard.error(id, new Failure(conflictMessage(conflict)));
    if (transfers.length > 0)
      checkup.tell({
        level: "warn",
        about: "backups",
        place: id,
        message: `${plural(transfers.length, "snapshot")} of the source, from ${transfers[0]?.snapshot.name} on, ${transfers.length === 1 ? "was" : "were"} not sent yet`,
        mend: `btrfs-backup -S ${shellWord(session.o.source.id)} ${shellWord(id)}`,
      });
    if (destination.stream !== null) return null;
    return ageOfNewest(standing.backups, session.o, heard, "backup");
  });
}

// ── setup: an argument file, a timer and a first run, proposed and made ──

export type SetupOptions = ReturnType<typeof setupOptions>;

/**
 * Proposes how SOURCE is backed up from now on, or does so with --yes; without SOURCE it tells what
 * there is to choose from. Nothing is proposed that a dry run refuses.
 */
export async function setup(o: SetupOptions, report: Report): Promise<void> {
  const { wanted } = o;
  if (wanted === null) return tellChoices(o, report);
  const facts = await factsFor(wanted.destinations);
  // A dry run excuses what is --optional, and now all must be there.
  const surplus = await rehearse(o, proposalFor(wanted, { ...facts, away: new Map() }));
  const proposal = proposalFor(wanted, { ...facts, surplus });
  if (!o.yes) {
    if (!o.json) print(proposalText(proposal));
    return report.event("proposal", { ...proposal });
  }
  if (proposal.daily.kind === "timer" && !proposal.daily.units)
    throw new Failure(`${UNITS_MISSING}; or --config-dir DIR, and a line for cron`);
  const first = o.runFrom(proposal, []);
  await makeFile(proposal);
  report.event("proposal", { ...proposal });
  await startDaily(proposal, report);
  await run(first, report);
}

/** Does a dry run with a proposal, and returns how many deletions it would come to. Errors: those of `run`. */
async function rehearse(o: SetupOptions, proposal: Proposal): Promise<number> {
  const rehearsal = newReport(o.json, true);
  await run(o.runFrom(proposal, ["--dry-run", "--quiet"]), rehearsal);
  if (rehearsal.failed)
    throw new Failure(
      "nothing was written, since a dry run fails as told above; mkdir -p makes a missing directory",
    );
  return rehearsal.tally["delete"] ?? 0;
}

/** Writes a proposal's argument file. Errors: Failure for one that is there already. */
async function makeFile({ directory, file, lines }: Proposal): Promise<void> {
  const asked = { directory, file: basename(file) };
  const text = lines.map((line) => `${line}\n`).join("");
  await ask({ ...LOCAL, fence: "try" }, WRITE_ARGUMENTS, asked, `cannot write ${file}`, text).catch(
    (error) => {
      if (!(error instanceof Taken)) throw error;
      throw new Failure(
        `${file} exists, and stays as it is: edit it, or move it away, or give another --config-dir. To run it: btrfs-backup ${shellWord(`@${file}`)}`,
      );
    },
  );
  log.info(`Wrote ${file}`);
}

/** Enables a proposal's timer, or tells the line for cron. */
async function startDaily({ daily }: Proposal, report: Report): Promise<void> {
  if (daily.kind === "cron")
    return log.info(`For daily runs, put into /etc/crontab: ${daily.line}`);
  try {
    await ask(LOCAL, ENABLE, { unit: daily.unit }, `cannot enable ${daily.unit}`);
    log.info(`Enabled ${daily.unit}`);
  } catch (error) {
    // The backups are worth having all the same.
    report.error(null, error);
  }
}

/** Tells what SOURCE and DEST can be. */
async function tellChoices({ json }: SetupOptions, report: Report): Promise<void> {
  const { mounts } = parseSurvey(await survey([]));
  const seen = await ask(LOCAL, LOOK_AROUND, { places: mounts.map(({ path }) => path) }, "setup");
  const choices = choicesIn(mounts, seen);
  if (!json) print(choicesText(choices));
  for (const { path, device } of choices.subvolumes) report.event("subvolume", { path, device });
  for (const one of choices.filesystems) report.event("filesystem", { ...one });
}

async function survey(places: readonly string[]): Promise<SurveyAnswer> {
  const nonce = crypto.randomUUID();
  return { nonce, text: await ask(LOCAL, SURVEY, { nonce, places: [...places] }, "setup") };
}

/** What a proposal for these destinations depends on. */
async function factsFor(destinations: readonly Location[]): Promise<SetupFacts> {
  const local = destinations.filter(isReadable).filter(isOnThisHost);
  const { places, all, ...found } = parseSurvey(await survey(local.map(({ path }) => path)));
  const away = local.flatMap(({ id }, i): [string, string][] => {
    const place = places[i];
    const why = place ? whyAway(placeOn(all, place).mount, found) : null;
    return why === null ? [] : [[id, why]];
  });
  return { ...found, away: new Map(away), surplus: 0 };
}

const isOnThisHost = (location: Readable) => location.host === null && isDirectory(location);

type SurveyAnswer = { readonly nonce: string; readonly text: string };

/** A line of fstab(5). */
type TableLine = { readonly path: string; readonly options: readonly string[] };

/** What a proposal depends on. `away`: why destinations, by ID, can be absent. */
export type SetupFacts = {
  readonly away: ReadonlyMap<string, string>;
  /** How many of what stands at SOURCE and DEST already the proposed retention would delete. */
  readonly surplus: number;
  readonly systemd: boolean;
  /** Both unit files of one source are installed. */
  readonly units: boolean;
  /**
   * The timer that runs all argument files is installed, and is at work, or there is no other file,
   * which may have a timer of its own.
   */
  readonly forAll: boolean;
  /** The directory of Prometheus' textfile collector. */
  readonly exporter: string | null;
  /** The installed program's path. */
  readonly program: string;
};

/** Reads what SURVEY prints; `mounts` are those of btrfs, and `all` every one. */
export function parseSurvey({ nonce, text }: SurveyAnswer) {
  const sections = new Map(
    text.split(`${nonce} `).map((section) => {
      const [name = "", ...lines] = section.trimEnd().split("\n");
      return [name, lines] as const;
    }),
  );
  const lines = (name: string) => sections.get(name) ?? [];
  const mountLines = lines("mounts").filter((line) => line.includes(" - "));
  const program = lines("program")[0] ?? "";
  const units = new Set(lines("units").map((path) => basename(path)));
  return {
    all: parseMounts(mountLines.join("\n")),
    mounts: parseMounts(mountLines.filter((line) => / - btrfs /.test(line)).join("\n")).filter(
      ({ path }) => path !== "",
    ),
    table: lines("fstab").flatMap((line): TableLine[] => {
      const [device = "", path = "", , options = ""] = line.trim().split(/\s+/);
      if (device === "" || device.startsWith("#")) return [];
      return [{ path: unescapedPath(path), options: options.split(",") }];
    }),
    removable: new Set(lines("removable")),
    places: lines("places"),
    systemd: lines("systemd").length > 0,
    units: units.has("btrfs-backup@.service") && units.has("btrfs-backup@.timer"),
    forAll:
      units.has("btrfs-backup.service") &&
      units.has("btrfs-backup.timer") &&
      (lines("forall").length > 0 || lines("files").length === 0),
    exporter: lines("exporter")[0] ?? null,
    program: program.startsWith("/") ? program : "/usr/local/sbin/btrfs-backup",
  };
}

/** Why the disk of a mount can be absent; null for one that is always mounted. */
export function whyAway(
  { path, device }: Pick<Mount, "path" | "device">,
  {
    table,
    removable,
  }: { readonly table: readonly TableLine[]; readonly removable: ReadonlySet<string> },
): string | null {
  if (path === "/") return null;
  if (removable.has(device)) return `${device} is a removable disk`;
  const line = table.find((one) => withoutSlash(one.path) === path);
  if (line === undefined) return `${path} is not in /etc/fstab, so nothing mounts it at boot`;
  const option = line.options.find((one) => MAY_BE_AWAY.has(one));
  return option === undefined ? null : `${path} is mounted with "${option}"`;
}

/** Options of fstab(5) with which a machine boots without that disk. */
const MAY_BE_AWAY = new Set(["noauto", "nofail", "x-systemd.automount"]);

/** What is to be set up. `options`: those of the command line that a run needs as well. */
export type SetupWanted = {
  readonly source: Readable;
  readonly destinations: readonly Location[];
  readonly options: readonly (readonly [name: string, value: string | null])[];
  /** Null for /etc/btrfs-backup. */
  readonly directory: string | null;
};

/** What starts the runs. */
type Start =
  | { readonly kind: "timer"; readonly unit: string; readonly units: boolean }
  | { readonly kind: "cron"; readonly line: string };

/** `lines` are those of the argument file, `words` the arguments that they stand for. */
export type Proposal = {
  readonly directory: string;
  readonly file: string;
  readonly lines: readonly string[];
  readonly words: readonly string[];
  readonly daily: Start;
  /** Commands, each with what it is for. */
  readonly commands: readonly (readonly [what: string, command: string])[];
};

const UNITS_MISSING =
  "the unit files btrfs-backup@.service and btrfs-backup@.timer are not installed: the package has them, and scripts/ beside the program's source; copy both to /etc/systemd/system";

/** The name of an argument file, and of a timer's instance, for a source. */
export function setupName({ host, path }: Pick<Readable, "host" | "path">): string {
  const whole = host === null ? path : `${host.name}${path}`;
  const plain = path === "/" && host === null ? "root" : whole.replace(/^\/|\/$/g, "");
  // systemd takes these in a unit's name, and /etc/cron.daily finds no file that begins with a dot.
  const name = plain
    .replaceAll("/", "-")
    .replace(/^\.|[^\w.:@-]/g, "_")
    .slice(0, 150);
  const isOwn = name === plain.replaceAll("/", "-") && whole !== "/root";
  return isOwn ? name : `${name}-${digestOf(whole).slice(0, 8)}`;
}

/** What is kept: an administrator mostly wants yesterday's file at once, and last year's at all. */
const SENSIBLE = { source: "7d", destination: "14d 8w 12m" };

/** Lines of an argument file with a comment. Each line is an option, its value, or a location. */
type CommentedLines = {
  readonly comment: string;
  readonly rows: readonly (readonly string[])[];
  /** The comment alone says something. */
  readonly stands?: true;
};

/** What is kept, unless that would delete what stood there before: then it is up to the user. */
const keeping = (row: readonly [string, string], comment: string, surplus: number) => {
  if (surplus === 0) return { comment, rows: [row] };
  const why = `Left out, since a run would delete ${surplus} that stood there before setup`;
  return {
    comment: `${comment} ${why}; if that is meant: ${row.join(" ")}`,
    rows: [],
    stands: true as const,
  };
};

/** An option as a line, which has no quotes. */
const optionRow = (name: string, value: string | null) => {
  if (value === null) return [`--${name}`];
  return value.startsWith("-") ? [`--${name}=${value}`] : [`--${name}`, value];
};

/** A location as a word. The blanks at the end of a line do not count, but those before a slash. */
const locationWord = ({ id, kind }: Location) =>
  id.trimEnd() === id || kind === "shell" ? id : `${id}/`;

/** The argument file, with a comment for each thing. */
function partsOf(
  { source, destinations, options }: SetupWanted,
  { away, surplus, exporter }: SetupFacts,
  name: string,
): CommentedLines[] {
  const steady = destinations.filter(({ id }) => !away.has(id));
  const absent = destinations.filter(({ id }) => away.has(id));
  const parts: CommentedLines[] = [
    { comment: "SOURCE: the subvolume to back up.", rows: [[locationWord(source)]] },
    { comment: "DEST: where the backups go.", rows: steady.map((one) => [locationWord(one)]) },
    ...absent.map((one) => ({
      comment: `DEST that can be absent: ${away.get(one.id)}.`,
      rows: [["--optional", locationWord(one)]],
    })),
    {
      comment: "A run fails once such a DEST has been absent for so long.",
      rows: absent.length > 0 ? [["--max-age", "14d"]] : [],
    },
    keeping(
      ["-N", SENSIBLE.source],
      "Snapshots that stay at SOURCE: the first one of each of the last 7 days.",
      surplus,
    ),
    ...(destinations.some(isReadable)
      ? [
          keeping(
            ["-n", SENSIBLE.destination],
            "Backups that stay at each DEST: the first one of each of 14 days, 8 weeks and 12 months.",
            surplus,
          ),
        ]
      : []),
    {
      comment: "A run waits at most so many seconds for another one that holds the lock.",
      rows: [["--wait", "3600"]],
    },
    {
      comment: "Figures for Prometheus' node exporter.",
      rows: exporter === null ? [] : [["--metrics", `${exporter}/btrfs-backup-${name}.prom`]],
    },
    {
      comment: "As they were given to setup.",
      rows: options.map(([option, value]) => optionRow(option, value)),
    },
  ];
  return parts.filter(({ rows, stands }) => stands || rows.length > 0);
}

/** All that is proposed. Errors: UsageError for what cannot stand in a line. */
export function proposalFor(wanted: SetupWanted, facts: SetupFacts): Proposal {
  const { source, destinations, options } = wanted;
  const directory = wanted.directory ?? "/etc/btrfs-backup";
  for (const text of [directory, source.id, ...destinations.map(({ id }) => id)])
    if (/[\r\n]/.test(text))
      throw new UsageError(`a line of an argument file cannot hold a line break: ${text}`);
  const name = setupName(source);
  const file = join(directory, `${name}.args`);
  const given = options.flatMap(([option, value]) =>
    value === null ? [`--${option}`] : [`--${option}=${value}`],
  );
  const parts = partsOf(wanted, facts, name);
  // The unit reads files in /etc/btrfs-backup only.
  const byTimer = facts.systemd && wanted.directory === null;
  const unit = facts.forAll ? "btrfs-backup" : `btrfs-backup@${name}`;
  const daily: Start = byTimer
    ? { kind: "timer", unit: `${unit}.timer`, units: facts.forAll || facts.units }
    : { kind: "cron", line: cronLine(facts.program, file) };
  return {
    directory,
    file,
    lines: [
      "# Arguments of btrfs-backup: one option with its value, or one place, a line, without quotes.",
      `# To see what a run would do: btrfs-backup --dry-run ${shellWord(`@${file}`)}`,
      ...parts.flatMap(({ comment, rows }) => [
        "",
        `# ${comment}`,
        ...rows.map((row) => row.join(" ")),
      ]),
    ],
    words: parts.flatMap(({ rows }) => rows.flat()),
    daily,
    commands: commandsFor(wanted, { file, given, service: byTimer ? `${unit}.service` : null }),
  };
}

/** The line for /etc/crontab, where a percent sign ends a line. */
const cronLine = (program: string, file: string) =>
  `17 3 * * * root ionice -c 3 ${[program, "--quiet", `@${file}`].map(shellWord).join(" ")}`.replaceAll(
    "%",
    "\\%",
  );

/** Commands to go on with. */
function commandsFor(
  { source, destinations, directory }: SetupWanted,
  how: {
    readonly file: string;
    readonly given: readonly string[];
    readonly service: string | null;
  },
): Proposal["commands"] {
  const { file, given, service } = how;
  const command = (...words: string[]) => ["btrfs-backup", ...words].map(shellWord).join(" ");
  const where = directory === null ? [] : ["--config-dir", directory];
  const ids = destinations.map(({ id }) => id);
  const restored = source.path === "/" ? `${source.id}restored` : `${source.id}.restored`;
  return [
    [
      "write the file, start the daily runs, and do the first",
      command("setup", "--yes", ...where, ...given, source.id, ...ids),
    ],
    ["run by hand", command(`@${file}`)],
    ["look at what there is", command("list", ...given, source.id)],
    ...(service === null
      ? []
      : ([["look at the runs", `journalctl -u ${shellWord(service)}`]] as const)),
    ...destinations
      .filter(isReadable)
      .map(
        ({ id }) =>
          ["get it all back, beside SOURCE", command("restore", ...given, id, restored)] as const,
      ),
  ];
}

/** A proposal as it is shown. */
export function proposalText({ file, lines, daily, commands }: Proposal): string {
  const indented = (all: readonly string[]) =>
    all.map((line) => (line === "" ? "\n" : `  ${line}\n`)).join("");
  const [what, command = ""] =
    daily.kind === "timer"
      ? ["start the daily runs", `systemctl enable --now ${daily.unit}`]
      : ["start the daily runs, put into /etc/crontab", daily.line];
  const missing = daily.kind === "timer" && !daily.units ? `\nFirst: ${UNITS_MISSING}.\n` : "";
  const [make, ...rest] = commands.map(
    ([purpose, line]) => `\nTo ${purpose}:\n${indented([line])}`,
  );
  return [
    `Nothing was written. ${file} would be:\n\n${indented(lines)}`,
    missing,
    make,
    `\nTo ${what}:\n${indented([command])}`,
    ...rest,
  ].join("");
}

/** What SOURCE and DEST can be chosen from. */
export type Choices = {
  readonly subvolumes: readonly { readonly path: string; readonly device: string }[];
  /** In bytes. */
  readonly filesystems: readonly {
    readonly path: string;
    readonly device: string;
    readonly free: number;
    readonly size: number;
  }[];
};

/** Reads what LOOK_AROUND prints. */
export function choicesIn(mounts: readonly Mount[], text: string): Choices {
  const seen = new Map<string, { device: string; inode: string; free: number; size: number }>();
  for (const line of text.split("\n")) {
    const [, inode = "", magic, free, size, block, path = ""] =
      /^(\d+) (\w+) (\d+) (\d+) (\d+) (\/.*)$/.exec(line) ?? [];
    const mount = mounts
      .filter((one) => isWithin(path, one.path))
      .sort(byLength)
      .at(-1);
    if (magic !== BTRFS_MAGIC || mount === undefined) continue;
    const bytes = (blocks?: string) => Number(blocks) * Number(block);
    seen.set(path, { device: mount.device, inode, free: bytes(free), size: bytes(size) });
  }
  const places = [...seen].sort(([a], [b]) => (a < b ? -1 : 1));
  const filesystems = groupBy(
    places.filter(([path]) => mounts.some((one) => one.path === path)),
    ([, { device }]) => device,
  );
  return {
    subvolumes: places
      .filter(([, { inode }]) => inode === "256")
      .map(([path, { device }]) => ({ path, device })),
    // Of several mounts of a filesystem, the one that is nearest to its top level stands for it.
    filesystems: [...filesystems.values()].flatMap((same) => {
      const depth = ([path]: (typeof same)[number]) =>
        mounts.find((one) => one.path === path)?.root.length ?? Infinity;
      const [first] = [...same].sort((a, b) => depth(a) - depth(b));
      if (first === undefined) return [];
      const [path, { device, free, size }] = first;
      return [{ path, device, free, size }];
    }),
  };
}

const byLength = (a: Mount, b: Mount) => a.path.length - b.path.length;

/** Choices as they are shown, with the command to go on with. */
export function choicesText({ subvolumes, filesystems }: Choices): string {
  const source = subvolumes.find(({ path }) => path === "/home") ?? subvolumes[0];
  const other = filesystems.find(({ device }) => device !== source?.device);
  const dest = other && join(other.path, basename(source?.path ?? "") || "root");
  const example = ["btrfs-backup", "setup", source?.path ?? "SOURCE", dest ?? "DEST"];
  const sources = subvolumes.map(({ path, device }) => [`  ${path}`, device]);
  const places = filesystems.map(({ path, device, free, size }) => [
    `  ${path}`,
    device,
    `${inBytes(free)} of ${inBytes(size)} free`,
  ]);
  const none = [["  none"]];
  return [
    "Subvolumes that can be SOURCE:\n",
    alignedTable(sources.length > 0 ? sources : none),
    "\nMounted btrfs filesystems, for a DEST on another one than SOURCE's:\n",
    alignedTable(places.length > 0 ? places : none),
    "\nSOURCE can also be ssh://[user@]host/path, and DEST any place that a run takes (btrfs-backup --help).\n",
    `To see what is proposed, for example:\n  ${example.map(shellWord).join(" ")}\n`,
  ].join("");
}

// ── 9. Guard ─────────────────────────────────────────────────────────────────────────────
// The forced command of an ssh key that may do no more than its options say. All of the boundary is
// here, in the order in which it meets a command: reading the command, the rules of arguments, the
// rules of verbs with what they look at again, the parts that an answer leaves out, and the stream.
// Guard refuses a command that does not fit before anything has run.

// ── reading a command ──

/** The beginning of a command. Where the command runs is guard's to say. */
const BEGINNING = new RegExp(`^(${UNSHARE} |nsenter -t \\d{1,9} -m -- )?sh -c`);

const notOurs = () => refuse("this is no command of btrfs-backup");

/** The words behind `sh -c`, each quoted as `quote` does. Errors: Refused for any other text. */
function wordsOf(text: string): string[] {
  const beginning = BEGINNING.exec(text)?.[0];
  if (beginning === undefined || /[\n\r\0]/.test(text)) return notOurs();
  const words: string[] = [];
  const word = / '([^'\\!]*(?:'\\['\\!]'[^'\\!]*)*)'/y;
  for (word.lastIndex = beginning.length; word.lastIndex < text.length;) {
    const [, quoted = ""] = word.exec(text) ?? notOurs();
    words.push(quoted.replace(/'\\(.)'/g, "$1"));
  }
  return words;
}

/**
 * The verb and its arguments in a text that a run sent over ssh. Guard uses nothing else of it.
 * Errors: Refused for any other text.
 */
export function parseCommand(text: string): { name: string; sudo: boolean; args: string[] } {
  const words = wordsOf(text);
  // TRY runs a script with a title, which says the mode itself.
  const [title = "", mode = "", ...args] =
    words[1] === TRYING ? [words[3] ?? "", "", ...words.slice(4)] : words.slice(1);
  const name = /^btrfs-backup:([a-z-]+)$/.exec(title)?.[1];
  if (name === undefined || !["", "sudo", "fence"].includes(mode)) return notOurs();
  return { name, sudo: mode === "sudo", args };
}

/** The rights of a key, each with the option that gives it. */
const RIGHTS = {
  add: "a key without --source",
  source: "--source",
  read: "--allow-read",
  delete: "--allow-delete",
} as const;
type Right = keyof typeof RIGHTS;

export type GuardOptions = ReturnType<typeof guardOptions>;

/** The folder and the prefix that the arguments of a guarded verb have named so far. */
type Guarded = { readonly o: GuardOptions; folder: string; prefix: string };

/**
 * Reads an ssh command, and checks all of it. `serve` runs it, and returns the exit status. Errors:
 * Refused.
 */
export async function permitted(
  text: string,
  o: GuardOptions,
): Promise<{ verb: Declared; args: string[]; serve: () => Promise<number> }> {
  const { name, args } = parseCommand(text);
  const allowed = GUARDED.get(name) ?? refuse(`the verb ${name}`);
  const { rights, least, most } = allowed;
  const granted: Readonly<Record<Right, boolean>> = {
    add: !o.source,
    source: o.source,
    read: o.allowRead,
    delete: o.allowDelete,
  };
  if (!rights.some((right) => granted[right]))
    refuse(`${name} needs ${rights.map((right) => RIGHTS[right]).join(" or ")}`);
  if (args.length < least || args.length > most)
    refuse(`${name} with ${args.length} arguments, as another version has them`);
  return { verb: allowed.verb, ...(await allowed.check(args, { o, folder: "", prefix: "" })) };
}

// ── rules of arguments ──

/** Checks an argument, and returns the one that is used in its place. Errors: Refused. */
type ArgumentRule = (value: string, said: Guarded) => string;

const inQuotes = (value: string) =>
  JSON.stringify(value.length > 100 ? `${value.slice(0, 100)}…` : value);
/** A rule that a test decides. `what`: a word for the argument. */
const passing =
  (test: (value: string, said: Guarded) => boolean, what = "the argument"): ArgumentRule =>
  (value, said) =>
    test(value, said) ? value : refuse(`${what} ${inQuotes(value)}`);
const matching = (shape: RegExp) => passing((value) => shape.test(value));
const oneOf = (...words: readonly string[]) => passing((value) => words.includes(value));
/** An argument that is empty, or bound to a rule. */
const optionally =
  (rule: ArgumentRule): ArgumentRule =>
  (value, said) =>
    value === "" ? "" : rule(value, said);
const notGiven = passing(() => false);

const BYTES = matching(/^\d{1,18}$/);
const IDS = matching(/^\d+( \d+)*$/);
const UUID_BYTES = matching(/^[0-9a-f]{32}$/);
const SHA256 = matching(/^[0-9a-f]{64}$/);
const ONE_LINE = matching(/^[^\n\r\0]*$/);

const isOneLine = (value: string) => !/[\n\r\0]/.test(value);
const isName = (value: string) => isOneLine(value) && !value.includes("/");

const isOwnName = (name: string) =>
  /^\.btrfs-backup|^\.outstanding_transfers$|\.part$|\.btrfs(\.|$)/.test(name);

const statOf = (path: string) => lstatSync(path, { throwIfNoEntry: false });

const isSubvolume = (path: string) => {
  const found = statOf(path);
  return found?.isDirectory() === true && found.ino === 256;
};

/** Whether a path is a read-only subvolume: btrfs says EROFS of it, whoever asks. */
function isReadonlySubvolume(path: string): boolean {
  if (!isSubvolume(path)) return false;
  try {
    accessSync(path, constants.W_OK);
    return false;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EROFS";
  }
}

/** A path without symbolic links, as far as the path exists. */
function resolvedPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path === "/" ? path : join(resolvedPath(dirname(path)), basename(path));
  }
}

/** A place that the key may use: in one of its paths, and not inside of a backup. */
const PLACE_RULE: ArgumentRule = (value, said) => {
  if (!value.startsWith("/") || !isOneLine(value) || value !== withoutSlash(normalize(value)))
    refuse(`the path ${inQuotes(value)}`);
  const real = resolvedPath(value);
  const top = said.o.paths.map(resolvedPath).find((path) => isWithin(real, path));
  if (top === undefined)
    return refuse(`${inQuotes(value)} is not below ${said.o.paths.join(" or ")}`);
  for (let path = real; path !== top; path = dirname(path)) {
    if (isOwnName(basename(path))) refuse(`${inQuotes(value)} has a name that this program uses`);
    if (prefixOf(basename(path)) !== null || isReadonlySubvolume(path))
      refuse(`${inQuotes(value)} is inside of a backup`);
  }
  said.folder = real;
  return real;
};

/** A subvolume that can be backed up. It is not the folder of the arguments behind it. */
const SOURCE_RULE: ArgumentRule = (value, said) => {
  const { folder } = said;
  if (!said.o.source) refuse("it is not for sources");
  const source = PLACE_RULE(value, said);
  said.folder = folder;
  return source;
};

/** A folder below the one of the arguments. */
const BELOW_RULE: ArgumentRule = (value, said) => {
  const { folder } = said;
  if (!value.startsWith("./")) refuse(`the path ${inQuotes(value)}`);
  const below = join(folder, "x").slice(0, -1) + value.slice(2);
  const real = PLACE_RULE(below, said);
  said.folder = folder;
  return real === below ? value : refuse(`${inQuotes(value)} leads elsewhere`);
};

const PREFIX_RULE: ArgumentRule = (value, said) => {
  if (!isPrefix(value) || value.includes("\ufffd")) refuse(`the prefix ${inQuotes(value)}`);
  said.prefix = value;
  return value;
};

const DATED = passing((value) => prefixOf(value) !== null && isName(value), "the name");

/** A read-only subvolume of the folder: no link, and no subvolume that is being received. */
const STANDING: ArgumentRule = (value, { folder }) =>
  entryName(value) !== null && isReadonlySubvolume(join(folder, value))
    ? value
    : refuse(`${inQuotes(value)} is no snapshot in ${folder}`);
const LISTED_NAME: ArgumentRule = (value, said) =>
  value.startsWith("./")
    ? `./${STANDING(value.slice(2), said)}`
    : refuse(`the argument ${inQuotes(value)}`);

/**
 * A parent for a difference: a snapshot of the folder, or a read-only subvolume elsewhere in the
 * key's paths, by the path from the folder, which leads through no link.
 */
const PARENT_RULE: ArgumentRule = (value, said) => {
  if (!value.includes("/")) return STANDING(value, said);
  const path = join(said.folder, value);
  const isPlain = isOneLine(value) && value === relative(said.folder, path);
  return isPlain && isForeign(path, said)
    ? value
    : refuse(`${inQuotes(value)} is no snapshot in ${said.o.paths.join(" or ")}`);
};
const LISTED_PARENT: ArgumentRule = (value, said) =>
  value.startsWith("./")
    ? `./${PARENT_RULE(value.slice(2), said)}`
    : refuse(`the argument ${inQuotes(value)}`);

/** Whether a path, without links, is a read-only subvolume in the key's paths. */
const isForeign = (path: string, { o }: Guarded) =>
  isReadonlySubvolume(path) &&
  resolvedPath(path) === path &&
  o.paths.map(resolvedPath).some((top) => isWithin(path, top) && path !== top);

/** What a snapshot can be taken of: a source, or a snapshot that others took. */
const SNAPSHOT_OF: ArgumentRule = (value, said) => {
  const { folder } = said;
  const isOwn = prefixOf(basename(value)) !== null;
  if (!value.startsWith("/") || isOwn || !isForeign(value, said)) return SOURCE_RULE(value, said);
  PLACE_RULE(dirname(value), said);
  said.folder = folder;
  return value;
};

const isObject = (value: string) => STREAM.test(value) && isName(value);
const OBJECT = passing(
  (value, { prefix }) =>
    isObject(value) && parseName(STREAM.exec(value)?.[1] ?? "", prefix) !== null,
  "the object",
);
/** An object, what stands beside it, or a part that was to become one of these. */
const ANY_OBJECT = passing(
  (value) =>
    isObject(value.replace(/^\.(.*)\.part$/s, "$1").replace(/\.(sha256|kept|p[0-2]-\d*)$/, "")),
  "the object",
);
/** An object, or the kept part of one to go on from. */
const PART_RULE: ArgumentRule = (value, said) => {
  OBJECT(value.replace(/\.p[0-2]-\d*$/, ""), said);
  return value;
};

/** A path in a snapshot. */
const INNER = passing(
  (value) => value.startsWith("/") && value === normalize(value) && isOneLine(value),
  "the path",
);

/** The rules of parameters that mean the same in every verb. */
const PARAMETERS = {
  nonce: matching(/^[0-9a-f-]{36}$/),
  wait: matching(/^(look|later|\d{1,6})$/),
  silence: matching(/^\d{1,4}$/),
  folder: PLACE_RULE,
  fsid: matching(/^[0-9a-f]{1,16}(\/\d{0,9}(\/[^\n\r\0]+)?)?$/),
  prefix: PREFIX_RULE,
  lock: PREFIX_RULE,
  holder: matching(/^\d{0,9}$/),
  // A line of the record, whole or in two parts. The line that is written is checked too.
  header: oneOf("", RECORD_HEADER),
  key: matching(/^(,"[^\n\r\0]*": )?$/),
  value: ONE_LINE,
  beginning: ONE_LINE,
  rest: ONE_LINE,
  flag: oneOf("-q", "-vv"),
  level: matching(/^(1?\d)?$/),
  part: PART_RULE,
  bytes: BYTES,
  kept: BYTES,
  objects: ANY_OBJECT,
  snapshot: STANDING,
  snapshots: LISTED_NAME,
  inner: INNER,
  format: oneOf(STAT_FORMAT),
};

// ── rules of verbs ──

/** A rule for every parameter of a verb. The rule of `names...` is for each name. */
type Rules<V> = { readonly [Name in keyof ArgumentsOf<V>]-?: ArgumentRule };
/**
 * The rules that a verb must say, since its parameters of these names are not in PARAMETERS, and
 * others that it may say.
 */
type OwnRules<V> = Omit<Rules<V>, keyof typeof PARAMETERS> & Partial<Rules<V>>;

type Again<V> = (given: ArgumentsOf<V>, said: Guarded) => Promise<ArgumentsOf<V>>;
/**
 * The bounds of a verb beyond the shape of its arguments. `again` looks again at the place as it is
 * now, and returns the arguments that are used. `serve` runs a verb that does not run as it is.
 * Errors: Refused.
 */
type Beyond<V> = {
  readonly again?: Again<V>;
  readonly serve?: (given: ArgumentsOf<V>, said: Guarded) => Promise<number>;
};

/**
 * A guarded key may use a verb with one of these rights, and so many arguments, if `check` accepts
 * them.
 */
type Allowed = {
  readonly verb: Declared;
  readonly rights: readonly Right[];
  readonly least: number;
  readonly most: number;
  readonly check: (
    words: readonly string[],
    said: Guarded,
  ) => Promise<{ args: string[]; serve: () => Promise<number> }>;
};

function allow<V extends Declared>(
  declaration: V,
  rights: readonly Right[],
  own: OwnRules<V>,
  { again: lookAgain, serve: serveOtherwise }: Beyond<V> = {},
): [string, Allowed] {
  const parameters = parametersOf(declaration);
  const rules = { ...PARAMETERS, ...own } as Rules<V>;
  const check: Allowed["check"] = async (words, said) => {
    const accepted: Record<string, string | string[]> = {};
    for (const [i, { name, kind }] of parameters.entries()) {
      const rule = rules[name as keyof Rules<V>];
      const [word] = words.slice(i);
      if (kind === "...") accepted[name] = words.slice(i).map((one) => rule(one, said));
      else if (word !== undefined) accepted[name] = rule(word, said);
    }
    const given = accepted as ArgumentsOf<V>;
    const used = lookAgain === undefined ? given : await lookAgain(given, said);
    return {
      args: wordsFor(declaration, used),
      serve: () => serveOtherwise?.(used, said) ?? runFenced(declaration, used),
    };
  };
  const least = parameters.filter(({ kind }) => kind === "").length;
  const most = parameters.some(({ kind }) => kind === "...") ? Infinity : parameters.length;
  return [declaration.name, { verb: declaration, rights, least, most, check }];
}

/** Runs a verb for a guarded key, behind the fence. */
function startFenced<V extends Declared>(
  declaration: V,
  given: ArgumentsOf<V>,
  stdout: "inherit" | "pipe" = "inherit",
): ProcessPromise {
  const host: Host = { ...LOCAL, fence: "own" };
  const child = shell({
    stdio: ["inherit", stdout, "inherit"],
    env: { PATH: process.env["PATH"] ?? "" },
    detached: true,
  })`${`exec ${commandWith(host, declaration, given)}`}`;
  running.add(() => sendSignal(-(child.pid as number), "SIGKILL"));
  return child;
}

/** The exit status of a verb that runs for a guarded key. */
const runFenced = async <V extends Declared>(declaration: V, given: ArgumentsOf<V>) =>
  (await startFenced(declaration, given)).exitCode ?? 1;

/** The folder of a guarded verb as it is now. */
async function folderNow(
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

/** Every key of a chain's record. A new one needs its rule in `guardedRecord`. */
const JUDGED: Readonly<Record<keyof ChainRecord, true>> = {
  owner: true,
  receiving: true,
  since: true,
  strangers: true,
  elders: true,
  destinations: true,
  leaps: true,
  imported: true,
  belated: true,
  kept: true,
  guarded: true,
  tree: true,
  unchanged: true,
};

/** The state of a folder that a key's record is compared with. */
type Judging = Pick<Folder, "chain" | "entries" | "standing" | "prefix">;

/**
 * A chain's record as a guarded key may write it. Errors: Refused for a record that takes anything
 * away.
 */
export function guardedRecord(text: string, folder: Judging, source: boolean): ChainRecord {
  const { chain: now, standing, prefix } = folder;
  const chain = chainIn(text, prefix);
  const full = asRead(chain, standing, prefix);
  checkElders(chain, folder);
  // An administrator's terminal will show it.
  if (HIDDEN.test(text)) refuse("a record with control characters");
  checkAnnouncement(full, folder);
  checkOwnership(full, now);
  const isSame = sameIn(full, now, "destinations");
  if (!isSame && !source) refuse("a record with other destinations");
  if (!source && !sameIn(chain, now, "leaps"))
    refuse("a record with other leaps of the clock: --adopt-clock is for the server");
  // What is gone is dropped on both sides.
  if (!sameIn(withoutGone(full, standing), withoutGone(now, standing), "kept"))
    refuse("a record that keeps something else: keep and release are for the server");
  const isOrigin = sameIn(full, now, "imported");
  if (!source && !isOrigin) refuse("a record with other origins");
  // The server alone knows since when a name is announced. Destinations are the key's word only:
  // nobody's --locked-dests may go by them.
  const { since: _, ...said } = full;
  const isKnown = said.receiving !== undefined && said.receiving === now.receiving;
  return {
    ...said,
    ...(isKnown && now.since !== undefined ? { since: now.since } : {}),
    ...(now.guarded || !isSame || !isOrigin ? { guarded: true as const } : {}),
  };
}

const sameIn = (one: ChainRecord, other: ChainRecord, key: keyof ChainRecord) =>
  JSON.stringify(one[key]) === JSON.stringify(other[key]);

/** The chain of a prefix in the text of its line. Errors: Refused. */
function chainIn(text: string, prefix: string): ChainRecord {
  const { chains, unreadable } = parseRecord(`${RECORD_HEADER}\n${recordKey(prefix)}${text}\n}`);
  const chain = chains.get(prefix);
  return chain !== undefined &&
    unreadable === null &&
    Object.keys(chain).every((key) => Object.hasOwn(JUDGED, key))
    ? chain
    : refuse("a record of another form");
}

function checkElders(chain: ChainRecord, { chain: now, standing }: Judging): void {
  if (now.elders !== undefined && !sameIn(chain, now, "elders"))
    refuse("a record with other strangers");
  if ((chain.elders?.until ?? 0) > Math.max(0, ...standing.map(({ id }) => id)))
    refuse("a record of backups that are not there yet");
}

/** Only a name that is announced already, or is free, can be announced. */
function checkAnnouncement(
  { receiving: name }: ChainRecord,
  { chain: now, prefix, entries }: Judging,
): void {
  if (name === undefined || name === now.receiving) return;
  if (parseName(name, prefix) === null || entries.has(name))
    refuse(`an announcement of ${inQuotes(name)}`);
}

/**
 * An owner and strangers are settled once. A restored source has another UUID. Whoever could add
 * strangers could hide backups: `restore`, its --before, `verify` and retention's newest leave them
 * out, so that a stolen key would choose which backups of its own they find instead.
 */
function checkOwnership({ owner, strangers = [] }: ChainRecord, now: ChainRecord): void {
  const settled = now.owner !== undefined;
  if (settled && (owner?.host !== now.owner?.host || owner?.path !== now.owner?.path))
    refuse("a record with another owner: --adopt is for the server");
  const foreign = new Set(strangers);
  const known = now.strangers ?? [];
  if (known.some((uuid) => !foreign.has(uuid)) || (settled && strangers.length !== known.length))
    refuse("a record with other strangers");
}

/**
 * A key's chains are another machine's: neither this filesystem nor a subvolume of it is their
 * source. Errors: Refused.
 */
function notFromHere({ owner }: ChainRecord, { place, subvolumes }: Folder, { o }: Guarded): void {
  if (o.source || owner === undefined) return;
  if (owner.uuid === place.filesystem || subvolumes.some(({ uuid }) => uuid === owner.uuid))
    refuse("a record with an owner that is on this filesystem");
}

/** The line of the record that a verb writes, if any. Errors: Refused. */
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

/** Only a record that guardedRecord allows. */
const recordAgain: Again<typeof WRITE_RECORD> = async (given, said) => {
  const prefix = /^,("(?:[^"\\]|\\.)*"): $/.test(given.key)
    ? (JSON.parse(given.key.slice(1, -2)) as string)
    : "/";
  PREFIX_RULE(prefix, said);
  if (given.header === "") refuse("a record without a header");
  return { ...given, ...recordedLine(given, await folderNow(said, "folder"), said) };
};

/**
 * Only the subvolume that the record says a broken transfer left. A transfer that was refused
 * before it began left none.
 */
async function discardServed(given: ArgumentsOf<typeof DISCARD>, said: Guarded): Promise<number> {
  const folder = await folderNow(said, "folder");
  if (folder.chain.receiving === undefined && !folder.entries.has(given.name)) return 0;
  if (folder.chain.receiving !== given.name)
    refuse(`${given.name} was not left by a broken transfer`);
  if (given.how === "whole" && !doubtedIn(folder).has(given.name)) refuse(`${given.name} is whole`);
  return runFenced(DISCARD, { ...given, ...recordedLine(given, folder, said) });
}

/**
 * No stream takes another's name or UUID. Of two with the same data either could stand for them,
 * and a later stream would build on the new one.
 */
const commitAgain: Again<CommitVerb> = async (given, said) => {
  const { object } = given;
  const { entries, store } = await folderNow(said, "raw");
  if (entries.has(object) || entries.has(object + SUM)) refuse(`${object} is there`);
  const uuid = STREAM.exec(object)?.[8] ?? "";
  if (store?.streams.some((one) => one.readonly && one.receivedUuid === uuid))
    refuse(`${uuid} is stored already`);
  return { ...given, part: given.part ?? "", kept: given.kept ?? "", uuid };
};

/** The streams of a store that are kept, and all that these build on, by their names. */
function keptObjects({ streams }: Store): Set<string> {
  const all = byUuid(streams);
  const kept = streams.filter((one) => one.kept !== undefined);
  return new Set(kept.flatMap((one) => chainOf(one, all)).map(({ uuid }) => uuid));
}

/** Without --allow-delete, only the objects that broken transfers left; never what is kept. */
const dropAgain: Again<DropVerb> = async (given, said) => {
  const { store } = await folderNow(said, "raw");
  const debris = new Set(
    [...(store?.debris ?? [])].flatMap(([name, objects]) =>
      parseName(name, said.prefix) === null ? [] : objects,
    ),
  );
  const whole = given.objects.find((one) => !debris.has(one));
  if (whole !== undefined && !said.o.allowDelete)
    refuse(`${whole} was not left by a broken transfer (--allow-delete)`);
  const kept = store === null ? new Set<string>() : keptObjects(store);
  for (const one of given.objects) {
    const isMark = one.endsWith(KEPT_MARK) && !debris.has(one);
    if (isMark || kept.has(one.replace(/\.sha256$/, "")))
      refuse(`${one} is kept: keep and release are for the server`);
  }
  return given;
};

/** Errors: Refused where somebody keeps what is to be deleted, or may do so. */
function refuseKept({ standing, record }: Folder, names: readonly string[]): void {
  if (record.unreadable !== null) refuse("a deletion where the record cannot be read");
  const kept = new Set(
    [...record.chains.values()].flatMap((chain) => chain.kept ?? []).map(({ uuid }) => uuid),
  );
  for (const one of standing)
    if (names.includes(one.name) && kept.has(dataOf(one)))
      refuse(`${one.name} is kept: keep and release are for the server`);
}

/**
 * Never what is kept, and never the newest snapshot of a source, unless it is the same as the one
 * before: what --if-changed took in vain.
 */
const deleteAgain: Again<typeof DELETE> = async (given, said) => {
  const names = given.names.map((name) => DATED(name.slice(2), said));
  const folder = await folderNow(said, "folder");
  const { standing, top } = folder;
  refuseKept(folder, names);
  const idOf = new Map<string, string>(standing.map(({ name, id }) => [name, String(id)]));
  if (given.top !== top || given.ids !== names.map((name) => idOf.get(name)).join(" "))
    refuse("subvolumes that are others now");
  const newestTwo = (prefix: string) =>
    standing
      .filter(({ name, readonly }) => readonly && parseName(name, prefix) !== null)
      .sort((a, b) => a.id - b.id)
      .slice(-2);
  if (said.o.source)
    for (const name of names) {
      const [one, other] = newestTwo(prefixOf(name) as string);
      const newest = other ?? one;
      if (newest?.name !== name) continue;
      const isInVain =
        names.length === 1 &&
        one !== undefined &&
        one !== newest &&
        (await isRepeated(folder, one, newest, prefixOf(name) as string));
      if (!isInVain) refuse(`${name} is the newest snapshot`);
    }
  return given;
};

/** Whether a snapshot holds nothing that the one before has not, but for a tree's own records. */
const isRepeated = (
  folder: Folder,
  before: Entry,
  newest: Entry,
  prefix: string,
): Promise<boolean> =>
  isSameState(
    { ...folder, host: { ...LOCAL, fence: "own" } },
    before,
    newest,
    membersBelow(folder, prefix),
  ).catch(afterFailure(() => false));

/** Only the newest snapshot, within its prefix. */
const renameAgain: Again<typeof RENAME> = async (given, said) => {
  const { standing } = await folderNow(said, "folder");
  const prefix = prefixOf(given.name);
  const alike = standing.filter(({ name, readonly }) => readonly && prefixOf(name) === prefix);
  if (
    prefixOf(given.to) !== prefix ||
    alike.some(({ id }) => id > (alike.find(({ name }) => name === given.name)?.id ?? 0))
  )
    refuse(`${inQuotes(given.name)} is not the newest snapshot`);
  return given;
};

/** Whether a path of a snapshot leads through no link. */
const isInside = (snapshot: string, path: string) =>
  path
    .split("/")
    .slice(1, -1)
    .every((_, i, all) => !statOf(join(snapshot, ...all.slice(0, i + 1)))?.isSymbolicLink());

/** Only snapshots in which the path leads through no link. */
const versionsAgain: Again<typeof VERSIONS> = async (given, { folder }) => {
  const names = given.names.filter((name) => isInside(join(folder, name), given.inner));
  return { ...given, names };
};

/** Only paths that lead through no link, on both sides. */
const sizesAgain: Again<typeof FILE_SIZES> = async (given, { folder }) => {
  const led = given.paths.find(
    (path) => ![given.snapshot, given.parent].every((name) => isInside(join(folder, name), path)),
  );
  if (led !== undefined) refuse(`the path ${inQuotes(led)}`);
  return given;
};

/** The source itself, or a snapshot in the folder. */
const VERSION_OF: ArgumentRule = (value, said) =>
  value === "." && said.o.source ? value : STANDING(value, said);

const FILE: ArgumentRule = (value, said) => {
  PLACE_RULE(dirname(value), said);
  return INNER(value, said);
};

const NAMES = { names: LISTED_NAME };

const COMPARED_RULE = matching(COMPARED_NAME);

/** The verbs that a key may run. Guard refuses all others. */
const GUARDED: ReadonlyMap<string, Allowed> = new Map([
  allow(
    OPEN,
    ["add", "source"],
    { source: optionally(SOURCE_RULE), kind: oneOf("", "streams", "known") },
    { serve: openServed },
  ),
  allow(CREATE, ["add", "source"], {}),
  allow(JOIN, ["add", "source"], { paths: BELOW_RULE }),
  allow(MEMBERS, ["add", "source"], { kind: oneOf("", "streams"), paths: BELOW_RULE }),
  allow(PARENTS, ["add"], { source: oneOf(""), how: oneOf("", "look") }),
  allow(WRITE_RECORD, ["add", "source"], { sync: oneOf("sync") }, { again: recordAgain }),
  allow(RECEIVE, ["add"], { sum: SHA256, sync: notGiven }, { serve: receiveServed }),
  allow(FREE, ["add", "delete", "source"], {
    cleaned: oneOf("", "subvolumes", "files"),
    patience: matching(/^\d{1,2}$/),
    staying: optionally(IDS),
  }),
  allow(KEPT, ["add"], { object: OBJECT }),
  allow(TIDY, ["add"], {}),
  allow(DISCARD, ["add"], { name: DATED, how: oneOf("", "whole") }, { serve: discardServed }),
  allow(RAW.store, ["add"], { object: PART_RULE, size: optionally(BYTES) }, { serve: storeServed }),
  allow(
    RAW.commit,
    ["add"],
    { object: OBJECT, sum: SHA256, uuid: notGiven },
    { again: commitAgain },
  ),
  allow(RAW.drop, ["add", "delete"], {}, { again: dropAgain }),
  allow(RAW.fetch, ["read"], { how: oneOf("", "sum") }),
  allow(BELOW, ["read"], {}),
  allow(
    DELETE,
    ["delete", "source"],
    {
      ...NAMES,
      convert: oneOf("", "rw"),
      top: ONE_LINE,
      ids: IDS,
    },
    { again: deleteAgain },
  ),
  allow(RECEIVED, ["delete", "read"], NAMES),
  allow(MADE, ["delete", "read"], {}, { serve: madeServed }),
  allow(BORN, ["delete", "read"], NAMES),
  allow(SHOW, ["source"], {}),
  allow(
    SNAPSHOTS,
    ["source"],
    {
      source: SOURCE_RULE,
      name: DATED,
      paths: (value, said) => (value === "." ? value : BELOW_RULE(value, said)),
    },
    { again: snapshotsAgain, serve: snapshotsServed },
  ),
  allow(GENERATIONS, ["source"], {}, { serve: generationsServed }),
  allow(SNAPSHOT, ["source"], {
    source: SNAPSHOT_OF,
    name: DATED,
    uuid: matching(/^[0-9a-f-]{36}$/),
  }),
  allow(FOREIGN, ["source"], { dir: PLACE_RULE }, { serve: foreignServed }),
  allow(RENAME, ["source"], { name: STANDING, to: DATED }, { again: renameAgain }),
  allow(SEND, ["source", "read"], {
    protocol: matching(/^[12]?$/),
    parent: optionally(PARENT_RULE),
    skip: optionally(BYTES),
    sum: optionally(SHA256),
    uuid: UUID_BYTES,
    clone: optionally(UUID_BYTES),
  }),
  allow(PROGRESS, ["add", "source", "read", "delete"], {
    group: oneOf(""),
    verb: matching(/^[a-z-]{1,20}$/),
  }),
  allow(HEADS, ["source", "read"], { snapshots: LISTED_PARENT }),
  allow(BIRTHS, ["source", "read"], { snapshots: LISTED_PARENT }),
  allow(ESTIMATE, ["source", "read"], {
    parent: optionally(PARENT_RULE),
    idle: optionally(matching(/^yes$/)),
  }),
  allow(GROWN, ["source"], { source: SOURCE_RULE, generation: matching(/^\d{1,20}$/) }),
  allow(COMPRESSED, ["source", "read", "add"], { snapshot: optionally(STANDING) }),
  allow(REWRITTEN, ["source", "read"], { parent: PARENT_RULE, most: matching(/^\d{1,8}$/) }),
  allow(DIFFERENCE, ["source", "read"], { parent: STANDING }),
  allow(DIFFERENCE_NOW, ["source"], { source: SOURCE_RULE, name: COMPARED_RULE, parent: STANDING }),
  allow(CLEAR_COMPARED, ["source"], { names: COMPARED_RULE }),
  allow(
    FILE_SIZES,
    ["source", "read"],
    { parent: PARENT_RULE, paths: INNER },
    { again: sizesAgain },
  ),
  allow(SIZES, ["read"], NAMES),
  allow(QUOTAS, ["read"], { filesystem: matching(/^[0-9a-f-]{36}$/) }, { serve: quotasServed }),
  allow(DIGEST, ["read"], {}),
  allow(LISTING, ["read"], {}),
  allow(
    VERSIONS,
    ["read"],
    { word: oneOf(STAT_WORD), names: VERSION_OF },
    { again: versionsAgain },
  ),
  allow(TAKE, ["read"], {}),
  allow(LOCATE, ["read"], { file: FILE }),
]);

// ── how much a key may store ──

/** The files below a folder that count: no file in a backup, and none behind a link. */
function* filesBelow(folder: string): Generator<string> {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isFile()) yield path;
    else if (entry.isDirectory() && prefixOf(entry.name) === null) yield* filesBelow(path);
  }
}

/** Opens a plain file. Errors: Refused for all others. */
function openedPlain(path: string): number {
  try {
    const file = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    return fstatSync(file).isFile() ? file : refuse(`${inQuotes(path)} is not a plain file`);
  } catch (error) {
    if (error instanceof Refused) throw error;
    return refuse(`${inQuotes(path)} cannot be read: ${(error as Error).message}`);
  }
}

/** Runs a program. Nothing else happens meanwhile. */
const ranNow = (program: string, ...args: readonly string[]) =>
  spawnSync(program, args, {
    encoding: "utf8",
    maxBuffer: 2 ** 30,
    env: { PATH: `${process.env["PATH"] ?? ""}:/usr/sbin:/sbin`, LC_ALL: "C" },
  });

/** The bytes that a broken transfer has left of a subvolume. */
function leftoverBytes(path: string): number {
  if (!isSubvolume(path) || isReadonlySubvolume(path)) return 0;
  // `du` does not tell of data that are in memory only.
  const script = `btrfs filesystem sync "$1" >&2; btrfs filesystem du -s --raw "$1"`;
  const { stdout } = ranNow("sh", "-c", script, "sh", path);
  return Number(/^\s*(\d+)\s/m.exec(stdout)?.[1] ?? 0);
}

/**
 * The bytes of a folder's standing backups, as its record says, and of leftovers. Errors: Refused
 * for an unreadable record.
 */
function recordedBytes(path: string): number {
  const file = openedPlain(path);
  const { chains, stored, unreadable } = parseRecord(readFileSync(file, "utf8"));
  closeSync(file);
  if (unreadable !== null) refuse(`${inQuotes(path)} cannot be read`);
  const standing = new Set(listedNow(dirname(path)).map(({ receivedUuid }) => receivedUuid));
  let sum = 0;
  for (const { receiving: name } of chains.values())
    if (name !== undefined && entryName(name) !== null)
      sum += leftoverBytes(join(dirname(path), name));
  for (const one of stored?.values() ?? [])
    for (const [uuid, bytes] of Object.entries(one)) if (standing.has(uuid)) sum += bytes;
  return sum;
}

/** The bytes of all streams below paths, whole or kept in part. */
function bytesBelow(given: readonly string[]): number {
  const paths = given.map(resolvedPath);
  const files = new Set(
    paths.filter((path) => statOf(path)?.isDirectory()).flatMap((path) => [...filesBelow(path)]),
  );
  let sum = 0;
  for (const path of files) {
    const name = basename(path);
    if (name === ".btrfs-backup.json") sum += recordedBytes(path);
    else if (isObject(name) || PART_OF_OBJECT.test(name)) sum += statOf(path)?.size ?? 0;
  }
  return sum;
}

/** The name of an object's stream that is not whole yet. */
const PART_OF_OBJECT = /^\..*\.btrfs(\.zst)?(\.gpg)?(\.p[0-2]-\d*)?\.part$/s;

/**
 * Lets streams in one after the other, as long as --max-bytes has room. `work` gets the bytes that
 * it may have. `counted`: bytes that are there already, and will not be there twice. Errors:
 * Refused where there is no room.
 */
async function withinMaxBytes(
  { paths, maxBytes }: GuardOptions,
  counted: () => number,
  work: (left: number) => Promise<number>,
): Promise<number> {
  if (maxBytes === null) return work(Infinity);
  const wait = "3600"; // seconds
  const locked = lockFile(`--max-bytes\n${paths.join("\n")}`);
  const lock = spawn("flock", ["-w", wait, locked, "sh", "-c", "echo; exec cat >/dev/null"], {
    stdio: ["pipe", "pipe", "inherit"],
  });
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

/** Remembers how many bytes a backup's stream had, and forgets backups that are gone. */
async function rememberBytes(said: Guarded, uuid: string, bytes: number): Promise<void> {
  const folder = await folderNow(said, "folder");
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

/** Passes a stream on to a store, as far as there is room. */
async function storeServed(given: ArgumentsOf<StoreVerb>, { o }: Guarded): Promise<number> {
  if (o.maxBytes === null) return runFenced(RAW.store, given);
  const allowed = async () => {};
  const store = (left: number) => {
    const coming = { stream: false, level: "", file: null, left, most: o.maxBytes };
    return receiveThroughRelay(RAW.store, given, coming, { begins: allowed, whole: allowed });
  };
  return withinMaxBytes(o, () => 0, store);
}

// ── commands that do not run as they are ──

/**
 * Serves one command of an ssh key that may do no more than its options say. Returns the exit
 * status.
 */
export async function guard(o: GuardOptions): Promise<number> {
  const text = process.env["SSH_ORIGINAL_COMMAND"] ?? "";
  try {
    if (text === "")
      refuse(
        `guard is no command to type, and its key opens no shell: sshd runs it for a key of authorized_keys (see "btrfs-backup help keys")`,
      );
    const allowed = await permitted(text, o);
    checkFence();
    return await allowed.serve();
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

/**
 * An error as a refusal. The kernel's word on a name (too long, no such file) is one as well.
 * Errors: all others.
 */
function refusalOf(error: unknown): Refused {
  if (error instanceof Refused) return error;
  if (typeof (error as NodeJS.ErrnoException).syscall === "string")
    return new Refused((error as Error).message);
  throw error;
}

/** Errors: Refused where no verb can work behind the fence. Each verb itself checks its mount. */
function checkFence(): void {
  if (process.getuid?.() !== 0) refuse("guard needs root, for a mount namespace of its own");
  const { status, stderr } = spawnSync("sh", ["-c", `${UNSHARE} true`], { encoding: "utf8" });
  if (status !== 0)
    refuse(`guard needs a mount namespace of its own, and there is none: ${stderr.trim()}`);
}

/** Opens a folder, and tells the facts that concern the key. */
async function openServed(given: ArgumentsOf<typeof OPEN>, said: Guarded): Promise<number> {
  const child = startFenced(OPEN, given, "pipe");
  const output = await outputUntil(child, `\n${given.nonce} end\n`);
  if (typeof output === "string")
    process.stdout.write(narrowedAnswer(output, given.nonce, said.folder));
  return (await child).exitCode ?? 1;
}

/** Looks at the subvolumes of which snapshots are taken, as it did at their folders. */
async function snapshotsAgain(given: ArgumentsOf<typeof SNAPSHOTS>, said: Guarded) {
  const { folder } = said;
  said.folder = given.source;
  for (const path of given.paths) if (path !== ".") BELOW_RULE(path, said);
  said.folder = folder;
  return given;
}

/** Takes snapshots, and tells of those that are in the folder. */
function snapshotsServed(given: ArgumentsOf<typeof SNAPSHOTS>, said: Guarded): Promise<number> {
  return listServed(startFenced(SNAPSHOTS, given, "pipe"), given.paths.length + 1, said);
}

/** Tells the generations of the subvolumes below the key's paths. */
function generationsServed(given: ArgumentsOf<typeof GENERATIONS>, said: Guarded): Promise<number> {
  return listServed(startFenced(GENERATIONS, given, "pipe"), 0, said);
}

/** Passes on what quotas count for the subvolumes in the folder, and of no other. */
async function quotasServed(given: ArgumentsOf<typeof QUOTAS>, said: Guarded): Promise<number> {
  const { standing } = await folderNow(said, "folder");
  const ids = new Set(standing.map(({ id }) => id));
  const { stdout, exitCode } = await startFenced(QUOTAS, given, "pipe");
  for (const [id, { bytes, frees }] of countedIn(stdout))
    if (ids.has(id)) process.stdout.write(`0/${id} ${bytes} ${frees}\n`);
  return exitCode ?? 1;
}

/** Passes on so many lines, and of the list of subvolumes behind them what concerns the key. */
async function listServed(child: ProcessPromise, before: number, said: Guarded): Promise<number> {
  const { place, top: folder, mounts } = await folderNow(said, "folder");
  const inside = said.o.paths
    .map(resolvedPath)
    .filter((path) => isWithin(place.path, path))
    .map((path) => placeOn(mounts, path).top);
  const { stdout, exitCode } = await child;
  const lines = stdout.replace(/\n$/, "").split("\n");
  const told = lines.splice(0, before);
  for (const [line, , , , , , path] of listedLines(lines.join("\n"), LISTED))
    if ([folder, ...inside].some((top) => isWithin(`/${path}`, top))) told.push(line);
  process.stdout.write(`${told.join("\n")}\n`);
  return exitCode ?? 1;
}

/** Tells when the subvolumes of a folder were made. */
async function madeServed(given: ArgumentsOf<typeof MADE>, said: Guarded): Promise<number> {
  const { top } = await folderNow(said, "folder");
  const { stdout, exitCode } = await startFenced(MADE, given, "pipe");
  for (const [line, , , , path] of listedLines(stdout.replace(/\n$/, ""), LISTED_MADE))
    if (dirname(`/${path}`) === top) process.stdout.write(`${line}\n`);
  return exitCode ?? 1;
}

/** The answer of `open`, without the lines that concern neither the folder nor the source. */
export function narrowedAnswer(output: string, nonce: string, folder: string): string {
  const { top, source, mounts, place } = parseInspection(output, nonce, folder);
  const mount = placeOn(mounts, place.path).mount;
  const places = source === null ? [place] : [place, source];
  const tops = source === null ? [top] : [top, source.top];
  const isAlong = (path: string) => (one: string) => isWithin(one, path) || isWithin(path, one);
  const ours = (path: string) => path === mount.root || tops.some(isAlong(path));
  const listed = (shape: RegExp, group: number) => (text: string) =>
    [...listedLines(text, shape)].filter((found) => ours(`/${found[group]}`)).map(([line]) => line);
  const near = (path: string) => places.map((one) => one.path).some(isAlong(path));
  const lines: Record<string, (text: string) => string[]> = {
    subvolumes: listed(LISTED, 6),
    readonly: listed(LISTED_READONLY, 2),
    mounts: (text) => text.split("\n").filter((line) => near(parseMounts(line)[0]?.path ?? "")),
    filesystems: (text) =>
      text.split("\n").filter((line) => {
        const name = line.slice(line.lastIndexOf("/") + 1);
        return places.some(({ filesystem }) => filesystem === name);
      }),
  };
  const parts = output.split(`\n${nonce} `).map((part) => {
    const [name = "", ...text] = part.replace(/\n$/, "").split("\n");
    return lines[name] === undefined
      ? part
      : `${[name, ...lines[name](text.join("\n"))].join("\n")}\n`;
  });
  return parts.join(`\n${nonce} `);
}

/** Tells what is below a directory, and the mounts that lead there. */
async function foreignServed(given: ArgumentsOf<typeof FOREIGN>): Promise<number> {
  const child = startFenced(FOREIGN, given, "pipe");
  const { stdout, exitCode } = await child;
  if (exitCode === 0) process.stdout.write(narrowedForeign(stdout, given.nonce));
  return exitCode ?? 1;
}

/** The answer of `foreign`, without the lines that do not concern the directory. */
export function narrowedForeign(output: string, nonce: string): string {
  const sections = sectionsOf(output, nonce);
  const dir = sections.get("dir") ?? "";
  const { top } = placeOn(parseMounts(sections.get("mounts") ?? ""), dir);
  const listed = (shape: RegExp, group: number) => (text: string) =>
    [...listedLines(text, shape)]
      .filter((found) => isWithin(`/${found[group]}`, top))
      .map(([line]) => line)
      .join("\n");
  const narrowed: Record<string, (text: string) => string> = {
    subvolumes: listed(LISTED, 6),
    readonly: listed(LISTED_READONLY, 2),
    mounts: (text) =>
      text
        .split("\n")
        .filter((line) => isWithin(dir, parseMounts(line)[0]?.path ?? ""))
        .join("\n"),
  };
  return [...sections]
    .map(([name, text]) => `\n${nonce} ${name}\n${narrowed[name]?.(text) ?? text}\n`)
    .join("");
}

/** All subvolumes of a folder's filesystem. Nothing else happens meanwhile. Errors: Refused. */
function listedNow(folder: string): Subvolume[] {
  const listed = (...options: string[]) => {
    const words = ["subvolume", "list", "-a", ...options, folder];
    const { status, stdout, stderr } = ranNow("btrfs", ...words);
    return status === 0
      ? stdout.replace(/\n$/, "")
      : refuse(`the subvolumes cannot be listed: ${stderr}`);
  };
  return parseSubvolumes(listed("-c", "-u", "-q", "-R"), listed("-r"));
}

/**
 * The beginning of a stream: its subvolume's name and UUID, and the parent's UUID (null in full).
 */
type StreamStart = readonly [name: string, uuid: string, parent: string | null];

/** Checks the beginning of a stream against a folder as it is now. Errors: Refused. */
function checkStreamStart(
  folder: Folder,
  announced: string | undefined,
  [name, uuid, parent]: StreamStart,
): void {
  if (
    parseName(name, folder.prefix) === null ||
    (announced !== undefined && name !== announced) ||
    folder.entries.has(name)
  )
    refuse(`the subvolume ${inQuotes(name)}`);
  // All subvolumes of this moment, not of the session's beginning; and of the whole filesystem,
  // since receive looks for UUIDs in all of it, whatever its chroot. A subvolume that is received
  // later by the same UUID comes behind: receive takes the first.
  const all = listedNow(folder.path);
  if (all.some((one) => `/${one.path}` === join(folder.top, name)))
    refuse(`the subvolume ${inQuotes(name)}, which is there`);
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

/** Receives a stream, and reads along. A refused stream never gets to its end there. */
async function receiveServed(given: ArgumentsOf<typeof RECEIVE>, said: Guarded): Promise<number> {
  const { folder: path, prefix, header, beginning, rest, part } = given;
  const { maxBytes } = said.o;
  const folder = await folderNow(said, "folder");
  const announced = header === "" ? null : guardedRecord(beginning + rest, folder, false);
  if (announced !== null && announced.receiving === undefined)
    refuse("a transfer without an announcement");
  if (announced !== null) notFromHere(announced, folder, said);
  if (announced === null && maxBytes !== null)
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
  if (part !== undefined && !PART.test(`${part}.part`)) refuse(`the file ${inQuotes(part)}`);
  const file = part === undefined ? null : openedPlain(join(path, `.${part}.part`));
  let made = "";
  const allowing: Allowing = {
    async begins(...begun) {
      checkStreamStart(folder, name, begun);
      made = begun[1];
    },
    async whole(bytes) {
      if (maxBytes !== null) await rememberBytes(said, made, bytes);
    },
  };
  return withinMaxBytes(
    said.o,
    () => (file === null ? 0 : fstatSync(file).size),
    (left) => {
      const coming = { stream: true, level: given.level, file, left, most: maxBytes };
      const received = { ...given, flag: `${given.flag}C`, level: "", ...record };
      return receiveThroughRelay(RECEIVE, received, coming, allowing);
    },
  );
}

/**
 * The bytes that come with a guarded key: a send `stream` or any others, zstd's or as they are
 * (`level`), on standard input or from a `file`. There is room for `left` of `most` bytes.
 */
type Coming = {
  readonly stream: boolean;
  readonly level: string;
  readonly file: number | null;
  readonly left: number;
  readonly most: number | null;
};

/**
 * Looks at a stream when it `begins`, and works when it is `whole`, before its end is passed on.
 * Errors: Refused.
 */
type Allowing = {
  readonly begins: (...begun: StreamStart) => Promise<void>;
  readonly whole: (bytes: number) => Promise<void>;
};

/**
 * Runs a verb that takes the bytes that come with a key. The relay reads them first. Where the
 * relay or guard refuses, the verb is killed before its input closes. Returns the exit status.
 * Errors: Refused.
 */
async function receiveThroughRelay<V extends Declared>(
  declaration: V,
  given: ArgumentsOf<V>,
  coming: Coming,
  allowing: Allowing,
): Promise<number> {
  const { left, most } = coming;
  const state = join(mkdtempSync(join(runtimeDirectory(), "g")), "state");
  const reading: Relay = {
    guarded: {
      stream: coming.stream,
      most: left === Infinity ? null : left,
      refusal: noRoom(most),
      state,
    },
  };
  const unpacked =
    coming.level === "" ? "" : `{ zstd -q -d -c 3>&- 4>&-; echo "{\\"unpacked\\":$?}" >&3; } |`;
  const passed = `{ ${[...OURSELVES, RELAY, JSON.stringify(reading)].map(quote).join(" ")} || kill -KILL 0; } |`;
  const text = `${unpacked} ${passed} { exec 3>&- 4>&-; ${commandWith({ ...LOCAL, fence: "own" }, declaration, given)}; }`;
  const child = spawn("sh", ["-c", text], {
    detached: true,
    env: { PATH: process.env["PATH"] ?? "" },
    stdio: [coming.file ?? "inherit", "inherit", "pipe", "pipe", "pipe"],
  });
  const group = child.pid as number;
  const kill = () => sendSignal(-group, "SIGKILL");
  running.add(kill);
  const exited = new Promise<number | null>((done) => child.on("close", done));
  // A client may be silent as long as it lives: it may have a large tree to walk. The verb itself
  // looks whether the client lives.
  let silent = 0;
  const worked = async () =>
    `${readIfThere(state) === "r" ? ++silent : silent} ${await progressOf(LOCAL, { group })}`;
  const ended = attended(exited, declaration.name, worked, kill);
  ended.catch(() => {}); // told at the end
  child.stderr?.on("data", (chunk: Buffer) =>
    process.stderr.write(visible(chunk.toString().replace(/^Chroot to .*\n/m, ""))),
  );
  const [questions, answers] = child.stdio.slice(3) as unknown as [
    NodeJS.ReadableStream,
    NodeJS.WritableStream,
  ];
  answers.on("error", () => {}); // the relay has ended: its exit status tells
  const refused = await answered(questions, answers, allowing).then(() => null, refusalOf);
  answers.end();
  const status = await ended;
  if (refused !== null) throw refused;
  return status ?? 1;
}

/** Answers the processes of a guarded stream, until the stream is whole. Errors: Refused. */
async function answered(
  questions: NodeJS.ReadableStream,
  answers: NodeJS.WritableStream,
  allowing: Allowing,
): Promise<void> {
  for await (const line of createInterface(questions)) {
    const question = JSON.parse(line) as Said;
    if ("refused" in question) refuse(question.refused);
    if ("unpacked" in question) {
      if (question.unpacked !== 0) refuse("zstd cannot read the stream");
      continue;
    }
    if ("begins" in question) await allowing.begins(...question.begins);
    if ("whole" in question) await allowing.whole(question.whole);
    answers.write("\n");
    if ("whole" in question) return;
  }
}

// ── what is checked of a stream ──

// The relay checks streams before the rest of this file is loaded. So here are functions only, and
// they use nothing but functions.

/** The attributes of a send stream's commands by their numbers in linux/fs/btrfs/send.h. */
function streamAttributes() {
  return {
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
}
type AttributeName = keyof ReturnType<typeof streamAttributes>;

/**
 * The rule of an attribute: the UUID of a `source` to clone from, or a path below the subvolume.
 * `entry` and `created` name something below it; `inode` and `opened` can be the subvolume itself
 * too. btrfs receive follows a link that has the last name of a `created` (creat(2)) or `opened`
 * path, and none that has the last name of an `entry` or `inode`.
 */
type AttributeRule = "source" | "entry" | "created" | "inode" | "opened";

/**
 * A command of a send stream. Bits are the attributes that it `needs` and all that it `may` have;
 * `looked` at are those with a rule.
 */
type StreamCommand = {
  readonly name: string;
  readonly needs: number;
  readonly may: number;
  readonly looked: readonly { readonly type: number; readonly rule: AttributeRule }[];
};

function streamCommand(
  name: string,
  rules: { readonly [Name in AttributeName]?: AttributeRule },
  needed: readonly AttributeName[] = [],
  optional: readonly AttributeName[] = [],
): StreamCommand {
  const attribute = streamAttributes();
  const ruled = Object.keys(rules) as AttributeName[];
  const bits = (names: readonly AttributeName[]) =>
    names.reduce((sum, one) => sum | (1 << attribute[one]), 0);
  const needs = bits([...ruled, ...needed]);
  const looked = ruled.map((one) => ({
    type: attribute[one],
    rule: rules[one] as AttributeRule,
  }));
  return { name, needs, may: needs | bits(optional), looked };
}

/**
 * The commands of a send stream by their numbers in linux/fs/btrfs/send.h. Each has its attributes
 * with a rule, `path` first, then the others that send.c always puts into it, and those that it may
 * put into it.
 */
function streamCommands() {
  const one = streamCommand;
  const commands: Readonly<Record<number, StreamCommand>> = {
    1: one("subvol", { path: "inode" }, ["uuid", "ctransid"]),
    2: one("snapshot", { path: "inode" }, ["uuid", "ctransid", "cloneUuid", "cloneCtransid"]),
    3: one("mkfile", { path: "created" }, [], ["ino"]),
    4: one("mkdir", { path: "entry" }, [], ["ino"]),
    5: one("mknod", { path: "entry" }, ["rdev", "mode"], ["ino"]),
    6: one("mkfifo", { path: "entry" }, [], ["ino", "rdev", "mode"]),
    7: one("mksock", { path: "entry" }, [], ["ino", "rdev", "mode"]),
    8: one("symlink", { path: "entry" }, ["pathLink"], ["ino"]),
    9: one("rename", { path: "entry", pathTo: "entry" }),
    10: one("link", { path: "entry", pathLink: "inode" }),
    11: one("unlink", { path: "entry" }),
    12: one("rmdir", { path: "entry" }),
    13: one("set_xattr", { path: "inode" }, ["xattrName", "xattrData"]),
    14: one("remove_xattr", { path: "inode" }, ["xattrName"]),
    15: one("write", { path: "opened" }, ["offset", "data"]),
    16: one("clone", { path: "opened", cloneUuid: "source", clonePath: "opened" }, [
      "offset",
      "cloneLength",
      "cloneCtransid",
      "cloneOffset",
    ]),
    17: one("truncate", { path: "opened" }, ["size"]),
    18: one("chmod", { path: "opened" }, ["mode"]),
    19: one("chown", { path: "inode" }, ["uid", "gid"]),
    20: one("utimes", { path: "inode" }, ["atime", "mtime", "ctime"], ["otime"]),
    21: one("end", {}),
    24: one("fileattr", { path: "opened" }, ["flags"]),
    25: one(
      "encoded_write",
      { path: "opened" },
      ["offset", "unencodedFileLength", "unencodedLength", "unencodedOffset", "data"],
      ["compression", "encryption"],
    ),
  };
  return { attribute: streamAttributes(), commands };
}

/** Errors: Refused. */
function refuse(why: string): never {
  throw new Refused(why);
}

/**
 * A check that is under way. `pass` tells how far `bytes`, from `from` to `end`, may go on. After
 * `finish` nothing more comes, and the bytes that were held back may go. Errors of both: Refused.
 */
type Checking = {
  readonly pass: (bytes: Buffer, from: number, end: number) => number;
  readonly finish: () => void;
};

/** The attributes of the one command that is looked at. */
function foundAttributes() {
  let bytes: Buffer = Buffer.alloc(0);
  const [begins, ends] = [new Int32Array(32), new Int32Array(32)];
  /** The attributes that are there, as bits. */
  let seen = 0;
  const value = (type: number) => bytes.subarray(begins[type], ends[type]);
  return {
    value,
    has: (bits: number) => (seen & bits) === bits,
    hasOnly: (bits: number) => (seen & ~bits) === 0,
    number: (type: number) => streamNumber(value(type)),
    text: (type: number) => bytes.toString("latin1", begins[type], ends[type]),
    isPath: (type: number, itself: boolean) =>
      isPathBelow(bytes, begins[type] as number, ends[type] as number, itself),
    /**
     * Finds the attributes between two places. Returns whether they are well formed. The attribute
     * `rest` has no length of its own: it is the rest of the command.
     */
    read(all: Buffer, from: number, end: number, rest: number | null): boolean {
      bytes = all;
      seen = 0;
      for (let next = from; next < end;) {
        const type = next + 2 <= end ? bytes.readUInt16LE(next) : 0;
        const first = next + (type === rest ? 2 : 4);
        let last = end;
        if (type !== rest) last = first <= end ? first + bytes.readUInt16LE(next + 2) : Infinity;
        if (type < 1 || type > 31 || last > end || (seen & (1 << type)) !== 0) return false;
        seen |= 1 << type;
        begins[type] = first;
        ends[type] = last;
        next = last;
      }
      return true;
    },
  };
}
type FoundAttributes = ReturnType<typeof foundAttributes>;

/**
 * Whether bytes are a path of names: no name is empty, "." or "..", or has a NUL. `itself`: without
 * a name, they are one too.
 */
function isPathBelow(bytes: Buffer, from: number, end: number, itself: boolean): boolean {
  const [SLASH, DOT] = [0x2f, 0x2e];
  if (from === end) return itself;
  if (end - from > 4096) return false;
  let name = from;
  for (let next = from; next <= end; next++) {
    const byte = next === end ? SLASH : bytes[next];
    if (byte === 0) return false;
    if (byte !== SLASH) continue;
    const length = next - name;
    const isDots =
      bytes[name] === DOT && (length === 1 || (length === 2 && bytes[name + 1] === DOT));
    if (length === 0 || isDots) return false;
    name = next + 1;
  }
  return true;
}

/** Refuses an attribute that breaks its rule. Errors: Refused. */
function checkAttribute(
  { name }: StreamCommand,
  { type, rule }: StreamCommand["looked"][number],
  found: FoundAttributes,
  sources: readonly Buffer[],
): void {
  if (rule === "source") {
    if (!sources.some((one) => one.equals(found.value(type))))
      refuse(`${name}: from another subvolume`);
  } else if (!found.isPath(type, rule === "inode" || rule === "opened"))
    refuse(`${name}: the path ${JSON.stringify(found.text(type).slice(0, 200))}`);
}

/**
 * Refuses encoded data that receive cannot unpack safely: it trusts the lengths, and can never
 * unpack LZO safely. It unpacks data that the kernel does not take as they are. Errors: Refused.
 */
function checkEncoded(found: FoundAttributes): void {
  const attribute = streamAttributes();
  const number = (key: AttributeName) => found.number(attribute[key]);
  const [length, file, offset] = [
    number("unencodedLength"),
    number("unencodedFileLength"),
    number("unencodedOffset"),
  ];
  const place = number("offset");
  // The kernel takes only what begins at a multiple of a block.
  if (place % 4096n !== 0n) refuse(`encoded_write: at ${place}`);
  const given = (key: AttributeName) => (found.has(1 << attribute[key]) ? number(key) : 0n);
  const [compression, encryption] = [given("compression"), given("encryption")];
  const isZlibOrZstd = compression === 1n || compression === 2n;
  if (
    length < 1n ||
    length > 131072n ||
    offset + file > length ||
    encryption !== 0n ||
    !isZlibOrZstd
  )
    refuse(
      `encoded_write: compression ${compression} of ${length} bytes (--protocol 1 sends without)`,
    );
}

/**
 * The protocol and length of a stream's header; null before all of it is there. Errors: Refused.
 */
function streamHeader(
  bytes: Buffer,
  from: number,
  end: number,
): { readonly protocol: number; readonly length: number } | null {
  const MAGIC = "btrfs-stream\0";
  const length = MAGIC.length + 4;
  const known = bytes.toString("latin1", from, Math.min(end, from + MAGIC.length));
  if (!MAGIC.startsWith(known)) refuse("this is no send stream");
  if (end - from < length) return null;
  const protocol = bytes.readUInt32LE(from + MAGIC.length);
  if (protocol !== 1 && protocol !== 2) refuse(`a stream of protocol ${protocol}`);
  return { protocol, length };
}

/**
 * Reads along a send stream. It refuses a command that `btrfs send` would not send, or that could
 * reach out of the one subvolume that the stream makes. `begins` gets that subvolume's name, its
 * UUID, and its parent's (null in full). The end of the stream is held back until nothing follows.
 * Behind the fence the kernel follows no links and opens no devices: paths may lead anywhere.
 * Without a fence (`alone`), devices are refused, and paths through links that the stream made.
 */
export function streamCheck(
  begins: (name: string, uuid: string, parent: string | null) => void,
  alone = false,
): Checking {
  const HEADER = 10; // bytes: length, command, CRC
  const { attribute, commands } = streamCommands();
  const found = foundAttributes();
  const links = alone ? madeLinks() : null;
  let protocol = 0;
  /** The length of the end that is held back; 0 before. */
  let held = 0;
  /** The UUIDs that may be cloned from: the subvolume's own, and its parent's. */
  let sources: readonly Buffer[] | null = null;

  function beginSubvolume(isFull: boolean): void {
    if (sources !== null) refuse("a second subvolume");
    const uuid = Buffer.from(found.value(attribute.uuid));
    const parent = isFull ? null : Buffer.from(found.value(attribute.cloneUuid));
    const name = subvolumeName(found.value(attribute.path));
    if (uuid.every((byte) => byte === 0)) refuse("a subvolume without a UUID");
    begins(name, streamUuid(uuid), parent && streamUuid(parent));
    sources = parent === null ? [uuid] : [uuid, parent];
  }

  function check(command: StreamCommand): void {
    const { name, needs, may, looked } = command;
    if (!found.has(needs) || !found.hasOnly(may)) refuse(`${name}: other attributes than it has`);
    const [path, ...others] = looked;
    if (path !== undefined) checkAttribute(command, path, found, []);
    if (name === "subvol" || name === "snapshot") return beginSubvolume(name === "subvol");
    const known = sources ?? refuse("it does not begin with a subvolume");
    for (const other of others) checkAttribute(command, other, found, known);
    if (name === "encoded_write") checkEncoded(found);
    links?.check(command, found);
  }

  function pass(bytes: Buffer, from: number, end: number): number {
    let done = from;
    if (protocol === 0) {
      const header = streamHeader(bytes, from, end);
      if (header === null) return from;
      protocol = header.protocol;
      done += header.length;
    }
    // 64 KiB, and for protocol 2 what encoded data of 128 KiB need at any page size.
    const longest = (protocol === 1 ? 64 : 256) * 1024;
    // In protocol 2, data have no length of their own.
    const rest = protocol === 1 ? null : attribute.data;
    while (held === 0 && end - done >= HEADER) {
      const length = bytes.readUInt32LE(done) + HEADER;
      if (length > longest) refuse(`a command of ${length} bytes`);
      if (end - done < length) break;
      const code = bytes.readUInt16LE(done + 4);
      const command = commands[code] ?? refuse(`the unknown command ${code}`);
      if (!found.read(bytes, done + HEADER, done + length, rest))
        refuse(`${command.name}: an attribute that is unknown, cut short, or there twice`);
      check(command);
      if (command.name === "end") held = length;
      else done += length;
    }
    if (held > 0 && end - done > held) refuse("something follows the stream's end");
    return done;
  }
  const finish = () => void (held > 0 || refuse("the stream is not complete"));
  return { pass, finish };
}

/**
 * The links that a stream has made, by their paths in latin1: `check` refuses a command that goes
 * through one, or makes a device. Errors: Refused.
 */
function madeLinks() {
  const MOST = 64 * 2 ** 20; // bytes of their paths
  const { mode } = streamAttributes();
  const paths = new Set<string>();
  /** How many links there are below each directory. */
  const below = new Map<string, number>();
  let bytes = 0;
  const counted = (path: string, by: 1 | -1) => {
    bytes += by * path.length;
    for (let end = path.lastIndexOf("/"); end !== -1; end = path.lastIndexOf("/", end - 1)) {
      const directory = path.slice(0, end);
      const left = (below.get(directory) ?? 0) + by;
      if (left === 0) below.delete(directory);
      else below.set(directory, left);
    }
  };
  const make = (path: string) => {
    if (paths.size === paths.add(path).size) return;
    counted(path, 1);
    if (bytes > MOST) refuse("more links than can be remembered, and no fence");
  };
  const remove = (path: string) => {
    if (paths.delete(path)) counted(path, -1);
  };
  const move = (path: string, to: string) => {
    // rename(2) does nothing where both are names of one link: both stay.
    if (paths.has(path) && paths.has(to)) return;
    remove(to);
    let moving = paths.has(path) ? [path] : [];
    if (below.has(path) && moving.length === 0)
      moving = [...paths].filter((one) => one.startsWith(`${path}/`));
    for (const one of moving) remove(one);
    for (const one of moving) make(to + one.slice(path.length));
  };
  /** Refuses a path that goes through a link, or is one that is followed. */
  const walk = (name: string, path: string, followed: boolean) => {
    if (paths.size === 0) return;
    const through = (link: string) => {
      if (paths.has(link))
        refuse(`${name}: through the link ${JSON.stringify(link)}, and no fence`);
    };
    for (let end = path.indexOf("/"); end !== -1; end = path.indexOf("/", end + 1))
      through(path.slice(0, end));
    if (followed) through(path);
  };
  return {
    check({ name, looked }: StreamCommand, found: FoundAttributes): void {
      const isDevice = () => [0o020000n, 0o060000n].includes(found.number(mode) & 0o170000n);
      if (name === "mknod" && isDevice()) refuse(`${name}: a device, and no fence`);
      const [path = "", other = ""] = looked
        .filter(({ rule }) => rule !== "source")
        .map(({ type, rule }) => {
          const led = found.text(type);
          walk(name, led, rule === "created" || rule === "opened");
          return led;
        });
      if (name === "symlink") make(path);
      if (name === "link" && paths.has(other)) make(path);
      if (name === "rename") move(path, other);
      if (name === "unlink" || name === "rmdir") remove(path);
    },
  };
}

/** Refuses a stream with another beginning than was expected. */
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
  if (bytes.length === 8) return bytes.readBigUInt64LE();
  return bytes.length === 4 ? BigInt(bytes.readUInt32LE()) : refuse("a number of another length");
}

function subvolumeName(bytes: Buffer): string {
  const name = bytes.toString();
  if (!Buffer.from(name).equals(bytes) || name.includes("\ufffd"))
    refuse(`the name ${JSON.stringify(name.slice(0, 100))}, which is not UTF-8`);
  return name;
}

function streamUuid(bytes: Buffer): string {
  return bytes.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

// ── 10. Command line ─────────────────────────────────────────────────────────────────────

/** Every command but all and guard. */
const COMMON = [
  "run",
  "restore",
  "list",
  "verify",
  "versions",
  "drill",
  "diff",
  "copy",
  "prune",
  "keep",
  "release",
  "unpin",
  "check",
  "setup",
] as const;
type CommandName = (typeof COMMON)[number] | "all" | "guard";
/** `check` takes a run's command line as it is. */
const RUNNING = ["run", "check"] as const;
const SENDING = [...RUNNING, "copy"] as const;
const TRANSFERRING = [...SENDING, "restore", "drill"] as const;
const DELETING = [...SENDING, "prune"] as const;

/**
 * All that is known of an option. Help, man page, completions and the reading of arguments follow
 * from it.
 */
export type Option = {
  /** The commands that have it. */
  readonly of: readonly CommandName[];
  /** Help's words for it, and those of commands where the name means something else. */
  readonly means: string;
  readonly meansIn?: { readonly [Name in CommandName]?: string };
  readonly short?: string;
  /** Help's word for the value; a flag has none. */
  readonly value?: string;
  readonly repeatable?: true;
  /** An empty value means something; elsewhere it is a variable of a script that nobody has set. */
  readonly empty?: true;
  /** Behind --for DEST, the option counts for DEST only. */
  readonly perDest?: true;
  /** Many need it: the help of a command that has --help-all tells it. */
  readonly common?: true;
  /**
   * Versions 0.2 to 0.3.1 had the option. They took any beginning that only one of their options
   * has.
   */
  readonly old?: true;
};

const WHOLE_TREE = "The whole tree: also the subvolumes below that run --recursive has backed up";

/** Every option once, in its group and in the order of help. */
const GROUPS = {
  Options: {
    snapshot: {
      of: ["restore", "drill", "verify"],
      value: "NAME",
      means: "Restore this one (default: the newest)",
      meansIn: { verify: "Compare this one (default: the newest that both have)" },
    },
    before: {
      of: ["restore"],
      value: "TIME",
      means: "Restore the newest at or before 'YYYY-MM-DD[ HH:MM[:SS]]'",
    },
    random: { of: ["drill"], means: "Restore any one, another each time" },
    scratch: {
      of: ["versions", "restore", "drill"],
      value: "DIR",
      means:
        "Where streams are received for a while: a folder on btrfs, here (default: beside TARGET, if that leaves half of what is free)",
      meansIn: {
        versions:
          "Where streams are received for a while: a folder on btrfs, here (default: beside the source's snapshots, if that leaves half of what is free)",
        drill:
          "Where to restore to: a folder on btrfs, here (default: beside backups on a disk here)",
      },
    },
    replace: {
      of: ["restore"],
      means: "TARGET exists: keep it beside as TARGET.before-YYYYMMDD-HHMMSS",
    },
    "parent-from": {
      of: ["restore"],
      value: "DIR",
      means:
        "Where snapshots are that the transfer can build on (default: beside TARGET, and in its snapshot folder)",
    },
    size: {
      of: ["list"],
      means:
        "Tell how large each is: its stream, or what it references; where quotas are on, also what would be free without it, and else it takes long (btrfs filesystem du)",
    },
    last: {
      of: ["list"],
      value: "N",
      means: "Show only the newest N; the totals count all",
    },
    all: {
      of: ["verify", "unpin"],
      means: "Compare all that both have",
      meansIn: { unpin: "Forget every destination; a record that cannot be read is moved aside" },
    },
    get: {
      of: ["versions"],
      value: "WHEN|NAME",
      means: "Copy back what it was in a snapshot, or at a time like 'YYYY-MM-DD[ HH:MM[:SS]]'",
    },
    to: {
      of: ["versions"],
      value: "PATH",
      means: "Where to, on FILE's host (default: FILE.NAME)",
    },
    force: { of: ["versions"], means: "Replace a file that is there" },
    summary: {
      of: ["diff"],
      means: "Tell the bytes written below each directory, largest first, not each path",
    },
    path: {
      of: ["restore", "guard"],
      value: "PATH",
      repeatable: true,
      means: "Only this file or directory of the backup, which TARGET becomes",
      meansIn: { guard: "A directory that the key may back up to, or with --source from" },
    },
    "allow-read": {
      of: ["guard"],
      means: "It may read: restore from there, and verify",
    },
    "max-bytes": {
      of: ["guard"],
      value: "SIZE",
      means:
        "How many bytes the streams of its backups may have in all, with k, m or g for powers of 1024; one is received after the other then",
    },
    "allow-delete": {
      of: ["guard"],
      means: "It may delete backups (default: only what a broken transfer left)",
    },
    source: {
      of: ["guard"],
      means: "It may pull: take snapshots, send them, and delete old ones, but store nothing",
    },
    note: {
      of: ["keep"],
      value: "TEXT",
      empty: true,
      means: "Why it is kept: a line that list shows",
    },
    yes: {
      of: ["setup"],
      means: "Write the file, enable the timer where systemd runs, and do a first run",
    },
    "config-dir": {
      of: ["all", "list", "check", "setup"],
      value: "DIR",
      means: "Where the argument files NAME.args are (default: /etc/btrfs-backup)",
      meansIn: {
        setup:
          "Where the file is written; cron runs it, since the timer reads /etc/btrfs-backup only",
      },
    },
  },
  "What is taken and kept": {
    "num-snapshots": {
      common: true,
      of: [...RUNNING, "list"],
      short: "N",
      value: "POLICY",
      old: true,
      means:
        "What to keep at the source: a number, or words like '24h 7d 4w 12m 14d+' (default: 0, everything)",
    },
    "num-backups": {
      common: true,
      of: [...DELETING, "list"],
      short: "n",
      value: "POLICY",
      perDest: true,
      old: true,
      means: "What to keep at each destination (default: 0, everything)",
    },
    "min-free": {
      of: DELETING,
      value: "SIZE|PERCENT",
      perDest: true,
      means:
        "When a destination has less free in the end, delete its oldest beyond what -n says, one after the other; never the newest 7, what words with m and y keep, pins and what is kept by hand",
    },
    "min-keep": {
      of: DELETING,
      value: "N",
      perDest: true,
      means: "The newest N do not go for --min-free (default: 7)",
    },
    "latest-only": {
      of: RUNNING,
      old: true,
      means: "Deprecated: same as --num-snapshots 1",
    },
    "no-snapshot": {
      of: RUNNING,
      short: "S",
      old: true,
      means: "Take no snapshot, transfer existing ones",
    },
    recursive: {
      common: true,
      of: [...RUNNING, "restore", "list", "verify", "prune"],
      means: "Back up SOURCE and all subvolumes below it",
      meansIn: { restore: WHOLE_TREE, list: WHOLE_TREE, verify: WHOLE_TREE, prune: WHOLE_TREE },
    },
    exclude: {
      of: RUNNING,
      value: "PATTERN",
      repeatable: true,
      means: "With --recursive: not the subvolumes that PATTERN names, as in gitignore(5)",
    },
    import: {
      of: RUNNING,
      value: "DIR",
      means:
        "Take no snapshot, but take over those of SOURCE that snapper, Timeshift or btrbk took in DIR (relative to SOURCE, or absolute) since the newest one",
    },
    "if-changed": {
      of: RUNNING,
      means: "Keep no new snapshot where nothing has changed since the newest one",
    },
    "if-reachable": {
      of: RUNNING,
      means: "Wait for the destinations, and take no snapshot where none of them can be opened",
    },
    "snapshot-folder": {
      of: COMMON,
      short: "f",
      value: "DIR",
      empty: true,
      old: true,
      means: "Snapshot folder, relative to SOURCE or absolute (default: snapshot)",
    },
    "snapshot-prefix": {
      of: COMMON,
      short: "p",
      value: "PREFIX",
      empty: true,
      old: true,
      means: "What snapshot names begin with (default: nothing)",
    },
    "before-snapshot": {
      of: RUNNING,
      value: "CMD",
      means: "Run on SOURCE's host before the snapshot, which is not taken if it fails",
    },
    "after-snapshot": {
      of: RUNNING,
      value: "CMD",
      means: "Run on SOURCE's host after the snapshot, always",
    },
    "convert-rw": {
      of: DELETING,
      short: "w",
      old: true,
      means: "Make snapshots writable before deleting them (for user_subvol_rm_allowed)",
    },
    sync: {
      of: DELETING,
      short: "s",
      old: true,
      means: "Wait until deleted subvolumes are gone (btrfs subvolume sync)",
    },
    "adopt-clock": {
      of: DELETING,
      means: "Delete what is too old although the clock seems to have leapt: it is right",
    },
  },
  "What is sent, and how": {
    "no-transfer": { of: RUNNING, short: "T", old: true, means: "Transfer nothing" },
    "no-incremental": {
      of: SENDING,
      short: "I",
      old: true,
      means: "Always send in full",
    },
    "no-full": {
      of: SENDING,
      means:
        "Fail rather than send in full to a destination that has nothing of SOURCE, or nothing that a difference can be made against",
    },
    "newest-only": {
      of: SENDING,
      means: "Send only the newest snapshot, not what was missed before",
    },
    backfill: {
      of: SENDING,
      means: "Without -n: send also what is older than the newest snapshot that a destination has",
    },
    compress: {
      common: true,
      of: TRANSFERRING,
      value: "zstd[:LEVEL]",
      perDest: true,
      means: "Compress what travels between hosts, is stored as a stream, or goes to a command",
    },
    "rate-limit": {
      of: TRANSFERRING,
      value: "RATE",
      perDest: true,
      means: "Send at most so many bytes a second, with k, m or g for powers of 1024",
    },
    resume: {
      of: SENDING,
      means:
        "Over ssh: go on where a transfer broke. The stream is kept as a file over there until it is whole",
    },
    retries: {
      of: SENDING,
      value: "N",
      means: "Try again up to N times in this run when a connection is lost (default: 0)",
    },
    protocol: {
      of: TRANSFERRING,
      value: "1|2",
      means:
        "Version of the send stream (default: 2, with data as they are compressed on the disk, where both sides know it; 1 for what is stored)",
    },
    "trust-stream": {
      of: TRANSFERRING,
      means:
        "Receive what another host or a store made as it is: nobody reads along whether it keeps to its subvolume",
    },
  },
  "Several destinations": {
    optional: {
      common: true,
      of: SENDING,
      value: "DEST",
      repeatable: true,
      means: "A destination that may be absent",
    },
    "max-age": {
      of: [...SENDING, "list"],
      value: "DURATION",
      means: "Fail when an absent --optional destination was last served longer ago, e.g. 3d",
      meansIn: {
        list: "Only check that the newest backup is not older, e.g. 26h: one line each, and exit status 1 if it is",
      },
    },
    for: {
      of: SENDING,
      value: "DEST",
      repeatable: true,
      means:
        "A destination with -n, --min-free, --min-keep, --full-every, --compress, --encrypt-to and --rate-limit of its own, which follow",
    },
    jobs: {
      of: [...SENDING, "all"],
      value: "N",
      means:
        "Send at most N streams at a time; destinations that need the same stream get it together (default: all)",
      meansIn: {
        all: "Run at most N sources at a time (default: 3); how many streams each sends is up to its file",
      },
    },
    "keep-unsent": {
      of: RUNNING,
      means: "Keep what a destination could not get yet also for those that are --optional",
    },
    "drop-unsent": {
      of: RUNNING,
      means:
        "Keep nothing at the source for the sake of a destination that could not get it, but what both share",
    },
    "make-room": {
      of: SENDING,
      means: "When a destination is full, delete first what -n would delete afterwards",
    },
    "locked-dests": {
      of: RUNNING,
      old: true,
      means: "Add every known destination of SOURCE",
    },
    "remove-locks": {
      of: RUNNING,
      old: true,
      means: "Forget the given destinations first (see unpin)",
    },
    adopt: {
      of: SENDING,
      means: "Take over a destination that belonged to another source, or a replaced disk",
    },
    "skip-fs-checks": {
      of: SENDING,
      short: "C",
      old: true,
      means: "Do not check that SOURCE and DEST are on btrfs, and not on the same one",
    },
    "skip-space-check": {
      of: SENDING,
      means: "Send also what a destination seems to lack the space for",
    },
  },
  "Stored streams": {
    "full-every": {
      of: SENDING,
      value: "N|DURATION",
      perDest: true,
      means:
        "Stored streams: begin a new chain with a full one after N, or after a time like 30d; 0 is never (default: 30)",
    },
    "encrypt-to": {
      common: true,
      of: SENDING,
      value: "RECIPIENT",
      repeatable: true,
      perDest: true,
      means:
        "Encrypt streams that are stored or go to a command with gpg's public key of RECIPIENT",
    },
    unverified: {
      of: ["restore"],
      means: "Restore stored streams without their checksum objects",
    },
  },
  "Other hosts, and rights": {
    "ssh-opt": {
      of: COMMON,
      value: "OPTION",
      repeatable: true,
      old: true,
      means: "Passed to ssh as -o OPTION",
    },
    "ssh-sudo": {
      of: COMMON,
      old: true,
      means: "Run btrfs under sudo -n on other hosts",
    },
    sudo: { of: COMMON, means: "Run btrfs under sudo -n here" },
    timeout: {
      of: [...COMMON, "guard"],
      value: "SECONDS",
      means:
        "Give up what has done nothing for so long: no byte moved, and no process of it worked (default: 3600; 0 is never)",
    },
  },
  "What it tells": {
    "dry-run": {
      common: true,
      of: [...DELETING, "restore", "all"],
      means: "Say what would happen and why; change nothing",
    },
    wait: {
      common: true,
      of: [...DELETING, "restore", "keep", "release", "unpin", "all"],
      value: "SECONDS",
      means: "Wait for a lock that another run holds (default: do not wait)",
    },
    verbosity: {
      of: [...COMMON, "all"],
      short: "v",
      value: "LEVEL",
      old: true,
      means: "debug, info, warning or error (default: info)",
    },
    quiet: {
      common: true,
      of: [...COMMON, "all"],
      short: "q",
      old: true,
      means: "Same as --no-progress --verbosity warning",
    },
    json: {
      of: [...COMMON, "all"],
      means: "Tell what happens on standard output, one JSON object a line",
    },
    metrics: {
      of: [...RUNNING, "all", "drill"],
      value: "FILE",
      means: "Write metrics for Prometheus' node exporter (textfile collector)",
      meansIn: {
        all: "Write the metrics of all these sources into one file, besides their own",
        drill: "Write when the last good drill was, for Prometheus, into a file of drills alone",
      },
    },
    "no-progress": {
      of: [...TRANSFERRING, "verify", "all"],
      short: "P",
      old: true,
      means: "Show no progress",
    },
    "btrfs-debug": {
      of: TRANSFERRING,
      short: "d",
      old: true,
      means:
        "Let btrfs send and receive tell everything (-vv); with -v debug, show the scripts that run",
    },
    help: { common: true, of: [...COMMON, "all", "guard"], short: "h", means: "Show this text" },
    "help-all": { of: [...RUNNING, "copy"], means: "Show all options" },
    version: { of: ["run"], means: "Show the version" },
  },
} as const satisfies Readonly<Record<string, Readonly<Record<string, Option>>>>;

type Group = (typeof GROUPS)[keyof typeof GROUPS];
type NamesIn<G> = G extends unknown ? keyof G : never;
type ValuedIn<G> = G extends unknown
  ? { [Name in keyof G]: G[Name] extends { value: string } ? Name : never }[keyof G]
  : never;
type ValueName = ValuedIn<Group>;
type FlagName = Exclude<NamesIn<Group>, ValueName>;

export const OPTIONS: ReadonlyMap<string, Option> = new Map(
  Object.values(GROUPS).flatMap((group) => Object.entries<Option>(group)),
);

/** The options of a command as citty defines them. */
const optionsOf = (command: CommandName): ArgsDef =>
  Object.fromEntries(
    [...OPTIONS]
      .filter(([, { of }]) => of.includes(command))
      .map(([name, { short, value, repeatable, means, meansIn }]) => [
        name,
        {
          type: value === undefined ? "boolean" : "string",
          alias: short,
          valueHint: value,
          description: `${meansIn?.[command] ?? means}${repeatable ? " (repeatable)" : ""}`,
        },
      ]),
  );

const positional = (description: string, required = true) =>
  ({ type: "positional", description, required }) as const;
const PLACE = "/path or ssh://[user@]host[:port]/path";
const STORE = "raw:///path, raw+ssh://[user@]host[:port]/path or rclone://REMOTE:PATH";

/** Options as they were given: the last value of each, or all of a repeatable one. */
type Options = {
  readonly flag: (name: FlagName) => boolean;
  readonly value: (name: ValueName) => string | null;
  readonly all: (name: ValueName) => string[];
  /** The one of some options that was given last. */
  readonly last: (...names: readonly (ValueName | FlagName)[]) => string | null;
};
/** A command line. `scopes`: the options that hold for each --for DEST. */
type Given = Options & {
  readonly positionals: readonly string[];
  /** These, and what --optional and --for name, in their order. */
  readonly places: readonly string[];
  readonly scopes: readonly { readonly dest: string; readonly options: Options }[];
};
type GivenOption = readonly [name: string, value: string];

type Definition = ArgDef & { alias?: string; valueHint?: string; required?: boolean };
type Defined = readonly [name: string, definition: Definition];

/**
 * An argument with the beginning of an old option's name gets the whole name. No value begins with
 * two dashes.
 */
function withWholeName(arg: string, defined: readonly Defined[]): string {
  const isDefined = (name: string) => defined.some(([one]) => one === name);
  const [, name = "", rest = ""] = /^--([a-z][a-z-]*)(=.*)?$/s.exec(arg) ?? [];
  const old = [...OPTIONS].filter(([, option]) => option.old).map(([one]) => one);
  if (name === "" || isDefined(name) || !old.every(isDefined)) return arg;
  const meant = old.filter((one) => one.startsWith(name));
  if (meant.length > 1)
    throw new UsageError(`--${name} can mean ${meant.map((one) => `--${one}`).join(" or ")}`);
  return meant.length === 1 ? `--${meant[0]}${rest}` : arg;
}

/**
 * -n=3 as --num-backups=3. argparse let -n=3 pass; parseArgs would take the = for a part of the
 * value.
 */
function withoutEquals(arg: string, defined: readonly Defined[]): string | null {
  const [, short, value] = /^-([A-Za-z])=(.*)$/s.exec(arg) ?? [];
  if (short === undefined) return null;
  const [name] = defined.find(([, { alias, type }]) => alias === short && type === "string") ?? [];
  return name === undefined ? null : `--${name}=${value}`;
}

/** Reads arguments strictly. Errors: UsageError that names the nearest option. */
export function readArguments(args: readonly string[], definitions: ArgsDef): Given {
  const defined = Object.entries(definitions as Readonly<Record<string, Definition>>).filter(
    ([, { type }]) => type !== "positional",
  );
  const spelled = args.map((arg) => withoutEquals(arg, defined) ?? withWholeName(arg, defined));
  const options = Object.fromEntries(
    defined.map(([name, { type, alias }]) => [
      name,
      {
        type: type === "boolean" ? ("boolean" as const) : ("string" as const),
        ...(alias === undefined ? {} : { short: alias }),
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
    const words = tokens.flatMap((token): GivenOption[] =>
      token.kind === "option" ? [[token.name, token.value ?? ""]] : [],
    );
    for (const [name, value] of words) needValue(name, value);
    const places = tokens.flatMap((token): string[] => {
      if (token.kind === "positional") return [token.value];
      const isPlace = token.kind === "option" && ["optional", "for"].includes(token.name);
      return isPlace && token.value !== undefined ? [token.value] : [];
    });
    return { positionals, places, ...inScopes(words) };
  } catch (error) {
    throw argumentError(error as Error, defined);
  }
}

/** Errors: UsageError for an option without its value, which would hold nothing. */
function needValue(name: string, value: string): void {
  const option = OPTIONS.get(name);
  if (value === "" && option?.value !== undefined && option.empty === undefined)
    throw new UsageError(
      `--${name} cannot be empty: give ${option.value}, or leave the option out`,
    );
}

const optionsAmong = (words: readonly GivenOption[]): Options => {
  const all = (name: string) => words.filter(([one]) => one === name).map(([, value]) => value);
  return {
    flag: (name) => all(name).length > 0,
    value: (name) => all(name).at(-1) ?? null,
    all,
    last: (...names) => words.findLast(([one]) => names.some((name) => name === one))?.[0] ?? null,
  };
};

/** The options that hold everywhere, and those for each --for DEST. */
function inScopes(words: readonly GivenOption[]): Options & Pick<Given, "scopes"> {
  const everywhere: GivenOption[] = [];
  const scopes: { dest: string; own: GivenOption[] }[] = [];
  for (const word of words) {
    const [name, value] = word;
    if (name === "for") scopes.push({ dest: value, own: [] });
    else ((OPTIONS.get(name)?.perDest && scopes.at(-1)?.own) || everywhere).push(word);
  }
  const scope = (own: readonly GivenOption[]) => {
    const others = everywhere.filter(([name]) => !own.some(([one]) => one === name));
    return optionsAmong([...others, ...own]);
  };
  return {
    ...optionsAmong(everywhere),
    scopes: scopes.map(({ dest, own }) => ({ dest, options: scope(own) })),
  };
}

/** An error of parseArgs in our words. */
function argumentError(
  { message, code }: Error & { code?: string },
  defined: readonly Defined[],
): UsageError {
  const dashed = /^Option '(--?[\w-]+)' argument is ambiguous/.exec(message)?.[1];
  if (dashed !== undefined)
    return new UsageError(
      `${dashed} has no value: what follows it begins with a dash, and would be another option`,
    );
  if (code !== "ERR_PARSE_ARGS_UNKNOWN_OPTION")
    return new UsageError(message.replaceAll("\n", " "));
  const named = /'(-*)([^']*)'/.exec(message); // Bun leaves the dash of a short one out
  const unknown = `${named?.[1] || "-"}${named?.[2] ?? ""}`;
  const best = nearest(
    unknown,
    defined.map(([name]) => `--${name}`),
  );
  const isNear = unknown.startsWith("--") && best.far <= 3;
  let meant = isNear ? `; did you mean ${best.word}?` : "";
  const having = commandsWith(unknown);
  if (unknown === "--help-all") meant = "; --help tells all options of this command";
  else if (having.length > 0)
    meant = `; ${having.join(", ")} ${having.length === 1 ? "has" : "have"} it`;
  if (unknown.startsWith("--keep-"))
    meant = `; what is kept is said by -N (at the source) and -n (at destinations), as in -n "7d 4w 12m"`;
  return new UsageError(`unknown option ${unknown}${meant}`);
}

/** The commands that have an option. Nobody types the words of a key, which are no option elsewhere. */
const commandsWith = (spelled: string): readonly CommandName[] =>
  [...OPTIONS]
    .filter(([name, { short }]) => spelled === `--${name}` || spelled === `-${short}`)
    .flatMap(([, { of }]) => of.filter((name) => name !== "guard"));

/** The number of letters to add, drop or change to make one word of the other (Levenshtein). */
export function editDistance(a: string, b: string): number {
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
export const expandFiles = (args: readonly string[], read: (path: string) => string): string[] =>
  args.flatMap((arg) => placedWords(arg, read).map(({ word }) => word));

/** The words that an argument stands for. Errors: those of expandFiles. */
function placedWords(
  arg: string,
  read: (path: string) => string,
  including: readonly string[] = [],
): Placed[] {
  if (!arg.startsWith("@")) return [{ word: arg, file: "", line: 0 }];
  const named = arg.slice(1);
  const path = normalize(
    named.startsWith("/") ? named : join(dirname(including.at(-1) ?? "."), named),
  );
  if (including.includes(path))
    throw new UsageError(`argument files include each other: ${[...including, path].join(" -> ")}`);
  let text: string;
  try {
    text = read(path);
  } catch (error) {
    throw new UsageError(`cannot read the argument file ${path}: ${(error as Error).message}`);
  }
  return wordsIn(path, text).flatMap((one) =>
    one.word.startsWith("@") ? placedWords(one.word, read, [...including, path]) : [one],
  );
}

/** The words of an argument file's text, each with its line. */
const wordsIn = (file: string, text: string): Placed[] =>
  text
    .split(/\r\n|\r|\n/)
    .map((line, i) => ({ line: i + 1, text: line.trim() }))
    .filter((one) => one.text !== "" && !one.text.startsWith("#"))
    .flatMap(({ line, text: words }) =>
      (/^(-\S*)\s+(.*)$/.exec(words)?.slice(1) ?? [words]).map((word) => ({ word, file, line })),
    );

/** The value of an option that must be a whole number. */
function wholeNumber(given: Options, name: ValueName, otherwise: number, least = 0): number {
  const text = given.value(name);
  if (text === null) return otherwise;
  if (!/^\d{1,9}$/.test(text) || Number(text) < least)
    throw new UsageError(
      `--${name} takes a whole number${least > 0 ? ` from ${least}` : ""}, not "${text}"`,
    );
  return Number(text);
}

/** A location that must be a folder with subvolumes. */
function folderLocation(text: string | undefined, what: string): Readable {
  if (text === undefined) throw new UsageError(`${what} is missing`);
  const location = parseLocation(text);
  if (!isReadable(location) || !holdsSubvolumes(location))
    throw new UsageError(`${what} cannot be ${KINDS[location.kind].called}: ${text}`);
  return location;
}

/** A location that can be read from. */
function readableLocation(text: string): Readable {
  const location = parseLocation(text);
  if (!isReadable(location))
    throw new UsageError(`nothing can be read from ${KINDS[location.kind].called}: ${text}`);
  return location;
}

/** Sets how long the program waits for a process that does nothing. */
function limitTime(given: Given): void {
  const own = setting();
  own.stuck = 1000 * wholeNumber(given, "timeout", 3600) || Infinity;
  own.parting = Math.min(10e3, own.stuck);
}

/** How much is told: as the last of --quiet and --verbosity says, be it behind an argument file. */
const verbosityOf = ({ last, value }: Options) =>
  last("quiet", "verbosity") === "quiet" ? "warning" : (value("verbosity") ?? "info");

/** The options of every command. */
function commonOptions(given: Given) {
  const verbosity = verbosityOf(given);
  if (!Object.hasOwn(LEVELS, verbosity))
    throw new UsageError(
      `--verbosity is one of ${Object.keys(LEVELS).join(", ")}, not "${verbosity}"`,
    );
  setting().level = LEVELS[verbosity as keyof typeof LEVELS];
  setting().scripts = given.flag("btrfs-debug");
  const prefix = given.value("snapshot-prefix") ?? "";
  if (!isPrefix(prefix))
    throw new UsageError("a prefix is at most 200 bytes, without slashes and control characters");
  // An empty one was SOURCE itself for 0.3.1.
  const snapshotFolder = (given.value("snapshot-folder") ?? "snapshot") || ".";
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
    wait: wholeNumber(given, "wait", 0),
    json: given.flag("json"),
  };
}

/** What is to be free at a destination. Errors: UsageError. */
function minFreeOf(given: Options): MinFree | null {
  const newest = wholeNumber(given, "min-keep", 7, 1);
  const text = given.value("min-free");
  return text === null ? null : parseMinFree(text, newest);
}

/** Errors: UsageError for --min-keep, if --min-free is given for no destination. */
function needMinFree(given: Given): void {
  const all = [given, ...given.scopes.map(({ options }) => options)];
  const isGiven = (name: ValueName) => all.some(({ value }) => value(name) !== null);
  if (isGiven("min-keep") && !isGiven("min-free"))
    throw new UsageError("--min-keep says what does not go for --min-free, which is missing");
}

const policyOf = (given: Options, option: ValueName) => parsePolicy(given.value(option) ?? "0");

/** The value of an option, if it was given. */
function parsedWith<T>(given: Given, name: ValueName, parse: (text: string) => T): T | null {
  const text = given.value(name);
  return text === null ? null : parse(text);
}

const ageOf = (given: Given) =>
  parsedWith(given, "max-age", (text) => ({ ...parseDuration(text), text }));

const deletingOptions = ({ flag }: Given) => ({
  adoptClock: flag("adopt-clock"),
  deletion: { convertRw: flag("convert-rw"), sync: flag("sync") },
});

/** The positionals, as many as a command takes. */
function locationsOf(given: Given, least: number, most: number, what: string): Readable[] {
  const { positionals } = given;
  if (positionals.length < least || positionals.length > most)
    throw new UsageError(
      `${positionals.length < least ? "missing" : "too many"} arguments: give ${what}`,
    );
  return positionals.map(readableLocation);
}

// ── the options of each command ──

export function runOptions(given: Given) {
  const { flag, value } = given;
  const [first, ...rest] = given.positionals;
  const source = folderLocation(first, "SOURCE");
  needNoTree(given);
  const sourcePolicy = sourcePolicyOf(given);
  const common = commonOptions(given);
  const destinations = destinationsOf(given, rest, common.prefix ?? "");
  for (const [one, other] of [
    ["keep-unsent", "drop-unsent"],
    ["no-full", "no-incremental"],
    ["backfill", "newest-only"],
  ] as const)
    if (flag(one) && flag(other))
      throw new UsageError(`--${one} and --${other} contradict each other`);
  needMinFree(given);
  needNamed(given);
  if (flag("backfill") && destinations.some(({ minFree }) => minFree !== null))
    throw new UsageError(
      "--backfill and --min-free contradict each other: what goes for space would be sent again",
    );
  if (destinations.length === 0) sendingOptions(given, null); // nonsense is an error all the same
  return {
    ...common,
    prefix: common.prefix ?? "",
    source,
    destinations,
    recursive: flag("recursive"),
    excluded: excludedBy(given),
    member: null as Member | null,
    sourcePolicy,
    backupPolicy: policyOf(given, "num-backups"),
    minFree: minFreeOf(given),
    snapshot: !flag("no-snapshot"),
    ...takingOptions(given, source.path, destinations.length > 0 || flag("locked-dests")),
    transfer: !flag("no-transfer"),
    incremental: !flag("no-incremental"),
    newestOnly: flag("newest-only"),
    full: !flag("no-full"),
    backfill: flag("backfill"),
    ...deletingOptions(given),
    lockedDestinations: flag("locked-dests"),
    removeLocks: flag("remove-locks"),
    fsChecks: !flag("skip-fs-checks"),
    spaceCheck: !flag("skip-space-check"),
    adopt: flag("adopt"),
    keepUnsent: flag("keep-unsent"),
    dropUnsent: flag("drop-unsent"),
    makeRoom: flag("make-room"),
    maxAge: ageOf(given),
    jobs: wholeNumber(given, "jobs", Infinity, 1),
    beforeSnapshot: value("before-snapshot"),
    afterSnapshot: value("after-snapshot"),
    metrics: parsedWith(given, "metrics", (path) => resolve(path)),
    retries: wholeNumber(given, "retries", 0),
    ...displayOptions(given),
    sendingTo: (id: string) => sendingOptions(given, parseLocation(id)),
  };
}

/** What to keep at the source. Errors: UsageError for two that contradict each other. */
function sourcePolicyOf(given: Given) {
  if (!given.flag("latest-only")) return policyOf(given, "num-snapshots");
  if (!["1", null].includes(given.value("num-snapshots")))
    throw new UsageError("--latest-only is -N 1, and contradicts another -N: leave one out");
  return parsePolicy("1");
}

/**
 * Errors: UsageError for what a tree cannot have: each of its members knows folders of its own, which
 * are not the destinations of the whole.
 */
function needNamed({ flag }: Given): void {
  if (flag("recursive") && flag("locked-dests"))
    throw new UsageError("--recursive and --locked-dests contradict each other: name each DEST");
}

/** Errors: UsageError. The oldest of a tree's backups are not those of each of its folders. */
function needNoTree(given: Given): void {
  if (
    given.flag("recursive") &&
    given.all("min-free").length +
      given.scopes.filter(({ options }) => options.value("min-free") !== null).length >
      0
  )
    throw new UsageError(
      "--min-free and --recursive contradict each other: free space for a single folder of the tree",
    );
}

/** Errors: UsageError for patterns that mean nothing. */
function excludedBy(given: Given): readonly IgnoreRule[] {
  const patterns = given.all("exclude");
  if (patterns.length > 0 && !given.flag("recursive"))
    throw new UsageError("--exclude needs --recursive: a snapshot has all of its subvolume");
  return patterns.map((pattern) => {
    const rule = ignoreRule(pattern);
    if (rule === null)
      throw new UsageError(
        `--exclude "${pattern}" excludes nothing: it is a comment or a blank line of gitignore(5); a # that is meant is \\#`,
      );
    return rule;
  });
}

/** When a run takes a snapshot, or takes those over that others took. Errors: UsageError. */
function takingOptions({ flag, value }: Given, source: string, hasDestinations: boolean) {
  const directory = value("import");
  const ifReachable = flag("if-reachable");
  const ifChanged = flag("if-changed");
  const isGiven = {
    import: directory !== null,
    "if-changed": ifChanged,
    "if-reachable": ifReachable,
  };
  for (const [name, isIt] of Object.entries(isGiven))
    if (isIt && flag("no-snapshot"))
      throw new UsageError(`--${name} and --no-snapshot contradict each other`);
  if (directory !== null && flag("recursive"))
    throw new UsageError(
      "--import and --recursive contradict each other: take over the snapshots of one subvolume at a time",
    );
  if (directory !== null && ifChanged)
    throw new UsageError(
      "--import and --if-changed contradict each other: whoever takes the snapshots says when",
    );
  if (ifReachable && !hasDestinations)
    throw new UsageError("--if-reachable needs a destination: give DEST");
  return {
    importFrom: directory === null ? null : resolve(source, directory),
    ifChanged,
    ifReachable,
  };
}

/** Those of run, as a dry run has them, which forgets no pin and waits for no lock. */
function checkOptions(given: Given): RunOptions {
  needNoDirectory(given);
  return { ...runOptions(given), dryRun: true, wait: 0, removeLocks: false };
}

/** The wanted destinations. Errors: UsageError for options that a destination cannot honour. */
function destinationsOf(given: Given, positionals: readonly string[], prefix: string): Wanted[] {
  const { scopes } = given;
  const optional = given.all("optional");
  const own = new Map(scopes.map(({ dest, options }) => [parseLocation(dest).id, options]));
  if (own.size < scopes.length) throw new UsageError("--for names a destination twice");
  const absent = new Set(optional.map((text) => parseLocation(text).id));
  const named = new Set([...positionals, ...optional, ...scopes.map(({ dest }) => dest)]);
  const locations = given.places
    .filter((text) => named.has(text))
    .map(parseLocation)
    .map((location) => [location.id, location] as const);
  const optionsFor = ({ id }: Location) => own.get(id) ?? given;
  const destinations = [...new Map(locations).values()].map((location): Wanted => {
    const options = optionsFor(location);
    return {
      location,
      optional: absent.has(location.id),
      policy: policyOf(options, "num-backups"),
      minFree: minFreeOf(options),
      sending: sendingOptions(options, location),
    };
  });
  const stores = ({ location }: Wanted) => holdsStreams(location);
  if (destinations.some(stores) && Buffer.byteLength(prefix) > STREAM_PREFIX_BYTES)
    throw new UsageError(
      `a prefix is at most ${STREAM_PREFIX_BYTES} bytes for stored streams, whose names say much more`,
    );
  // An option for one destination, or for all, must have a meaning for one of them.
  const hasOwn = ({ location }: Wanted) => own.has(location.id);
  for (const some of [
    ...destinations.filter(hasOwn).map((one) => [one]),
    destinations.filter((one) => !hasOwn(one)),
  ]) {
    if (
      !some.some(stores) &&
      some.some(({ location }) => optionsFor(location).value("full-every") !== null)
    )
      throw new UsageError(
        "--full-every needs a destination of stored streams: raw://, raw+ssh:// or rclone://",
      );
    if (some.some(({ minFree }) => minFree !== null))
      needMeasurable(some.map((one) => one.location));
  }
  return destinations;
}

/** Errors: UsageError where none of these can tell how much is free there. */
function needMeasurable(locations: readonly Location[]): void {
  if (!locations.some(isDirectory))
    throw new UsageError(
      "--min-free needs a destination that tells at once what a deletion has freed: a folder, raw:// or raw+ssh://",
    );
}

// ── argument files of a directory ──

const CONFIGURATION = "/etc/btrfs-backup";

/** A word of an argument file, and where it stands. */
type Placed = { readonly word: string; readonly file: string; readonly line: number };

/** The options of `all`, and of a command that looks at all, which count for each argument file. */
const ON_TOP = ["verbosity", "wait"] as const;
const FLAGS_ON_TOP = ["dry-run", "quiet", "json", "no-progress"] as const;

function allOptions(given: Given): AllOptions {
  const { json } = commonOptions(given);
  return {
    json,
    dryRun: given.flag("dry-run"),
    jobs: wholeNumber(given, "jobs", SOURCES_AT_A_TIME, 1),
    metrics: parsedWith(given, "metrics", (path) => resolve(path)),
    members: configuredIn(given, { names: given.positionals, missing: "" }, runOptions),
  };
}

/** sshd lets a connection do ten things at a time (MaxSessions), and a source mostly does three. */
const SOURCES_AT_A_TIME = 3;

/** `list` without arguments: each argument file's SOURCE and destinations, as that file says. */
function listAllOptions(given: Given) {
  needNoOthers(given, ["size", "last", "max-age"]);
  needNoTable(given);
  const [size, last, maxAge] = [given.flag("size"), lastOf(given), ageOf(given)];
  const { json } = commonOptions(given);
  const members = configuredIn(
    given,
    { names: [], missing: "LOCATION… is missing, and " },
    (own): ListOptions => {
      const { prefix, snapshotFolder, hosts, ...o } = runOptions(own);
      const locations = [o.source, ...o.destinations.map(({ location }) => location)];
      const policies = { sourcePolicy: o.sourcePolicy, backupPolicy: o.backupPolicy };
      const common = { prefix, snapshotFolder, hosts, json: o.json, wait: 0 };
      const { recursive } = o;
      const mayBeAway = o.destinations.filter(({ optional }) => optional);
      const optional = new Set(mayBeAway.map(({ location }) => location.id));
      return { ...common, locations, optional, ...policies, recursive, size, last, maxAge };
    },
  );
  return { json, members, aged: maxAge !== null };
}

/** `check` without arguments: each argument file's next run. */
function checkAllOptions(given: Given): LookingAtAll<RunOptions> {
  needNoOthers(given, []);
  const { json } = commonOptions(given);
  const wanted = { names: [], missing: "SOURCE is missing, and " };
  return { json, members: configuredIn(given, wanted, checkOptions) };
}

/** Errors: UsageError for options that count for one SOURCE, where none is named. */
function needNoOthers(given: Given, own: readonly string[]): void {
  const known: readonly string[] = [...own, ...ON_TOP, ...FLAGS_ON_TOP, "config-dir"];
  for (const name of OPTIONS.keys())
    if (
      !known.includes(name) &&
      (given.all(name as ValueName).length > 0 || (name === "for" && given.scopes.length > 0))
    )
      throw new UsageError(
        `SOURCE is missing: --${name} counts for one; without any, each argument file has its own options`,
      );
}

/** Errors: UsageError for a directory of argument files where places are named. */
function needNoDirectory(given: Given): void {
  if (given.value("config-dir") !== null)
    throw new UsageError("--config-dir says where argument files are: name no places with it");
}

/**
 * The argument files that are named, or all, in the order of their names. Errors: UsageError where
 * there is none, or where others could have put some there.
 */
function configuredIn<O>(
  given: Given,
  { names, missing }: { readonly names: readonly string[]; readonly missing: string },
  read: (own: Given) => O,
): Configured<O>[] {
  const named = given.value("config-dir");
  const directory = resolve(named ?? CONFIGURATION);
  const there = argumentFilesIn(directory);
  const wanted = new Set(names.map((name) => name.replace(/\.args$/, "")));
  for (const name of wanted)
    if (!there.includes(name)) {
      if (name.includes("/"))
        throw new UsageError(
          `${name} is a path: name the files of ${directory} as they are there, without .args${there.length === 0 ? "" : ` (${someOf(there, 5)})`}; any other one is run by btrfs-backup @FILE`,
        );
      const { word, far } = nearest(name, there);
      throw new UsageError(
        `there is no ${join(directory, `${name}.args`)}${far <= 3 ? `; did you mean ${word}?` : ""}`,
      );
    }
  if (there.length === 0)
    throw new UsageError(
      `${missing}there is no argument file ${join(directory, "NAME.args")}; "btrfs-backup setup" makes one`,
    );
  const values = ON_TOP.flatMap((name) => given.all(name).map((value) => `--${name}=${value}`));
  const flags = FLAGS_ON_TOP.filter((name) => given.flag(name)).map((name) => `--${name}`);
  const top =
    given.last("quiet", "verbosity") === "quiet" ? [...values, ...flags] : [...flags, ...values];
  return there
    .filter((name) => wanted.size === 0 || wanted.has(name))
    .map((name) => ({
      name,
      read: () => readMember(join(directory, `${name}.args`), top, read),
    }));
}

/** Errors: UsageError where others can change a file of arguments, which root runs, or a directory of them. */
function needUnchanged(path: string): void {
  const { uid, gid, mode } = statSync(path);
  const isOwners = uid === 0 || uid === process.getuid?.();
  const isGroups = (mode & 0o20) === 0 || gid === 0 || gid === process.getgid?.();
  if (!isOwners || !isGroups || (mode & 0o2) !== 0)
    throw new UsageError(
      `others can change ${path}, and so what is run: chown root ${shellWord(path)}; chmod go-w ${shellWord(path)}`,
    );
}

/** The text of an argument file. Errors: UsageError; those of reading it. */
function argumentText(path: string): string {
  needUnchanged(path);
  return inUtf8(readFileSync(path), "it");
}

/** The names of a directory's argument files, in order. Errors: UsageError. */
function argumentFilesIn(directory: string): string[] {
  try {
    const names = readdirSync(directory)
      .filter((name) => /^[^.].*\.args$/s.test(name))
      .sort();
    needUnchanged(directory);
    // An empty one is switched off, for the units as well.
    const isEmpty = (name: string) =>
      statSync(join(directory, name), { throwIfNoEntry: false })?.size === 0;
    return names.filter((name) => !isEmpty(name)).map((name) => basename(name, ".args"));
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === "ENOENT") return [];
    throw new UsageError(`cannot read the argument files in ${directory}: ${message}`);
  }
}

/** The words of an argument file and of those that it includes. Errors: UsageError. */
function placedIn(file: string): Placed[] {
  const failed = (where: string, error: unknown) =>
    new UsageError(`${where}: ${(error as Error).message}`);
  let text: string;
  try {
    text = argumentText(file);
  } catch (error) {
    throw failed(file, error);
  }
  return wordsIn(file, text).flatMap((one) => {
    if (!one.word.startsWith("@")) return [one];
    try {
      return placedWords(one.word, argumentText, [file]);
    } catch (error) {
      throw failed(`${file}, line ${one.line}`, error);
    }
  });
}

/** Reads an argument file, with words on top. Errors: UsageError that says in which line. */
function readMember<O>(file: string, top: readonly string[], read: (own: Given) => O): O {
  const placed = placedIn(file);
  const parse = (words: readonly string[]) => {
    const end = words.indexOf("--");
    const all = words.toSpliced(end === -1 ? words.length : end, 0, ...top);
    const given = readArguments(all, COMMANDS.run.args as ArgsDef);
    const [first = ""] = given.positionals;
    if (isCommand(first))
      throw new UsageError(
        `"${first}" is a command: an argument file holds what stands behind run`,
      );
    for (const name of ["help", "help-all", "version"] as const)
      if (given.flag(name)) throw new UsageError(`--${name} has no place in an argument file`);
    return read(given);
  };
  try {
    return parse(placed.map(({ word }) => word));
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    const culprit = culpritOf(placed, parse, error.message);
    const where = culprit === null ? file : `${culprit.file}, line ${culprit.line}`;
    throw new UsageError(`${where}: ${error.message}`);
  }
}

/**
 * The line that an error is about: the last one without which there is none, else the first one
 * without which it is another. Null where it is about none, as where SOURCE is missing.
 */
export function culpritOf(
  placed: readonly Placed[],
  parse: (words: readonly string[]) => unknown,
  message: string,
): Placed | null {
  const isAlone = (own: readonly Placed[]) => own.length === 1 && !own[0]?.word.startsWith("-");
  let other: Placed | null = null;
  let last: Placed | null = null;
  for (const own of groupBy(placed, ({ file, line }) => `${line} ${file}`).values()) {
    // A location stands for others, which would be taken for it.
    const rest = placed.flatMap((one) => {
      if (!own.includes(one)) return [one.word];
      return isAlone(own) ? ["/"] : [];
    });
    try {
      parse(rest);
      last = own[0] ?? null;
    } catch (error) {
      if ((error as Error).message !== message) other ??= own[0] ?? null;
    }
  }
  return last ?? other;
}

function pruneOptions(given: Given) {
  needNoTree(given);
  const [location] = locationsOf(given, 1, 1, "LOCATION") as [Readable];
  const policy = policyOf(given, "num-backups");
  const minFree = minFreeOf(given);
  needMinFree(given);
  if (minFree !== null) needMeasurable([location]);
  else if (policy === null)
    throw new UsageError("what is to be kept? Give -n POLICY, or --min-free");
  return {
    ...commonOptions(given),
    location,
    policy,
    minFree,
    recursive: given.flag("recursive"),
    dryRun: given.flag("dry-run"),
    ...deletingOptions(given),
  };
}

export function restoreOptions(given: Given) {
  const { flag, value } = given;
  const [location] = locationsOf(
    given,
    2,
    2,
    "LOCATION and TARGET; --snapshot NAME is which one",
  ) as [Readable];
  const target = folderLocation(given.positionals[1], "TARGET");
  const snapshot = value("snapshot");
  if (snapshot !== null && value("before") !== null)
    throw new UsageError("--snapshot and --before exclude each other");
  needNoPathBeside(given);
  const words = (
    [
      "snapshot-prefix",
      "snapshot-folder",
      "ssh-opt",
      "snapshot",
      "before",
      "compress",
      "rate-limit",
    ] as const
  ).flatMap((name) => given.all(name).map((text) => `--${name}=${text}`));
  for (const name of ["sudo", "ssh-sudo", "unverified"] as const)
    if (flag(name)) words.push(`--${name}`);
  return {
    ...commonOptions(given),
    words: [...words, location.id],
    location,
    target,
    snapshot,
    before: parsedWith(given, "before", parseWhen),
    parentFrom: value("parent-from"),
    replace: flag("replace"),
    recursive: flag("recursive"),
    unverified: flag("unverified"),
    inner: value("path"),
    scratch: scratchOf(given),
    ...displayOptions(given),
    sending: sendingOptions(given, null),
  };
}

/** Errors: UsageError for options of restore that do not go with --path, and --path alone. */
function needNoPathBeside(given: Given): void {
  const paths = given.all("path");
  if (paths.length > 1) throw new UsageError("--path is given once");
  if (paths.length === 0) {
    if (given.value("scratch") !== null) throw new UsageError("--scratch goes with --path");
    return;
  }
  const flags = (["replace", "recursive"] as const).filter((name) => given.flag(name));
  const valued = (["parent-from", "compress", "protocol"] as const).filter(
    (name) => given.value(name) !== null,
  );
  for (const name of [...flags, ...valued])
    throw new UsageError(`--path and --${name} exclude each other`);
}

/** The folder of --scratch, on this host. Errors: UsageError. */
function scratchOf(given: Given): Readable | null {
  const text = given.value("scratch");
  if (text === null) return null;
  const location = folderLocation(text, "--scratch");
  if (location.host !== null) throw new UsageError(`--scratch is a folder on this host: ${text}`);
  return location;
}

export function drillOptions(given: Given) {
  const { flag, value } = given;
  const [location] = locationsOf(given, 1, 1, "LOCATION; --snapshot NAME is which one") as [
    Readable,
  ];
  const scratch = scratchOf(given);
  if (scratch === null && !(holdsSubvolumes(location) && location.host === null))
    throw new UsageError("--scratch DIR is missing: a folder on btrfs with room for a restore");
  if (flag("random") && value("snapshot") !== null)
    throw new UsageError("--snapshot and --random exclude each other");
  return {
    ...commonOptions(given),
    location,
    scratch: scratch ?? location,
    isBeside: scratch === null,
    snapshot: value("snapshot"),
    random: flag("random"),
    metrics: parsedWith(given, "metrics", (path) => resolve(path)),
    unverified: false,
    ...displayOptions(given),
    sending: sendingOptions(given, null),
  };
}

const displayOptions = (given: Given) => ({
  dryRun: given.flag("dry-run"),
  progress: !given.flag("no-progress") && !given.flag("quiet"),
  btrfsDebug: given.flag("btrfs-debug"),
});

/**
 * How to send, to a destination if there is one. Errors: UsageError for options that it cannot
 * honour.
 */
function sendingOptions(given: Options, location: Location | null): Sending {
  const [rate, compression, every, protocol] = (
    ["rate-limit", "compress", "full-every", "protocol"] as const
  ).map(given.value);
  if (protocol && !/^[12]$/.test(protocol))
    throw new UsageError(`--protocol is 1 or 2, not "${protocol}"`);
  const recipients = given.all("encrypt-to");
  const resume = given.flag("resume");
  if (recipients.length > 0) checkEncryption(resume, location);
  return {
    rate: rate ? parseRate(rate) : null,
    level: compression ? parseCompression(compression) : "",
    recipients,
    fullEvery: parseFullEvery(
      every ?? (location !== null && holdsStreams(location) ? FULL_EVERY : "0"),
    ),
    protocol: protocol ?? null,
    resume,
    spaceCheck: !given.flag("skip-space-check"),
    trust: given.flag("trust-stream"),
  };
}

/** Errors: UsageError where a destination cannot take encrypted streams. */
function checkEncryption(resume: boolean, location: Location | null): void {
  if (resume)
    throw new UsageError(
      "--resume and --encrypt-to exclude each other: gpg's output is another one each time",
    );
  if (location !== null && holdsSubvolumes(location))
    throw new UsageError(
      `--encrypt-to: what is received on btrfs cannot be encrypted: ${location.id}. For another destination only: --for DEST --encrypt-to …`,
    );
}

/** The streams of a stored chain by default, so that retention can free space. */
const FULL_EVERY = "30";

/** Errors: UsageError for options of a table, beside the one that shows none. */
function needNoTable(given: Given): void {
  const name = given.last("size", "last");
  if (name !== null && given.value("max-age") !== null)
    throw new UsageError(
      `--max-age and --${name} exclude each other: it checks the newest only, in a line for each`,
    );
}

export function listOptions(given: Given) {
  needNoDirectory(given);
  needNoTable(given);
  return {
    ...commonOptions(given),
    locations: locationsOf(given, 1, Infinity, "LOCATION…") as readonly Location[],
    sourcePolicy: policyOf(given, "num-snapshots"),
    backupPolicy: policyOf(given, "num-backups"),
    recursive: given.flag("recursive"),
    size: given.flag("size"),
    last: lastOf(given),
    optional: new Set<string>() as ReadonlySet<string>,
    maxAge: ageOf(given),
  };
}

/** How many of the newest are shown. */
const lastOf = (given: Given) => wholeNumber(given, "last", Infinity, 1);

export function verifyOptions(given: Given) {
  const { flag, value } = given;
  const [snapshot, all] = [value("snapshot"), flag("all")];
  if (snapshot !== null && all) throw new UsageError("--snapshot and --all exclude each other");
  const locations = locationsOf(
    given,
    1,
    Infinity,
    "SOURCE and LOCATION…, two LOCATIONs, or one of stored streams",
  );
  if (locations.filter(holdsSubvolumes).length === 1)
    throw new UsageError(
      `with what shall ${locations[0]?.id} be compared? Give SOURCE and LOCATION…, two LOCATIONs, or one of stored streams`,
    );
  return {
    ...commonOptions(given),
    locations,
    snapshot,
    all,
    recursive: flag("recursive"),
    /** Each one is told of, since somebody has asked for it. */
    each: value("verbosity") !== null,
    shown: !flag("no-progress") && !flag("quiet"),
  };
}

export function versionsOptions(given: Given) {
  const { flag, value } = given;
  const [, ...locations] = locationsOf(given, 1, Infinity, "FILE [LOCATION…]");
  const file = folderLocation(given.positionals[0], "FILE");
  const [get, to] = [value("get"), value("to")];
  if (get === null && (to !== null || flag("force")))
    throw new UsageError("--to and --force need --get");
  if (get !== null && !isTime(get) && prefixOf(get) === null)
    throw new UsageError(
      `--get takes the name of a snapshot, or a time like 'YYYY-MM-DD HH:MM', not "${get}"`,
    );
  if (to !== null && file.host !== null && !to.startsWith("/"))
    throw new UsageError("--to must be an absolute path, on FILE's host");
  return {
    ...commonOptions(given),
    file,
    locations,
    get,
    to: to !== null && file.host === null ? resolve(to) : to,
    force: flag("force"),
    scratch: scratchOf(given),
    unverified: false,
    ...displayOptions(given),
    sending: sendingOptions(given, null),
  };
}

function diffOptions(given: Given): DiffOptions {
  const [first, ...words] = given.positionals;
  if (first === undefined) throw new UsageError("missing arguments: give LOCATION");
  const location = readableLocation(first);
  if (!holdsSubvolumes(location))
    throw new UsageError(
      `${KINDS[location.kind].called} cannot be compared: btrfs tells what differs between subvolumes, not between streams: ${location.id}. Compare the snapshots at the source, or restore both to one btrfs folder`,
    );
  const names = namesToCompare(words);
  return {
    ...commonOptions(given),
    location,
    names,
    paths: names === null ? words : words.slice(2),
    summary: given.flag("summary"),
  };
}

/** The two snapshots that words begin with; null where no names are given. Errors: UsageError. */
function namesToCompare([older, newer]: readonly string[]): DiffOptions["names"] {
  const [isFirst, isSecond] = [older, newer].map(
    (word) => word !== undefined && !word.includes("/") && prefixOf(word) !== null,
  );
  if (isFirst && isSecond) return [older as string, newer as string];
  if (!isFirst && !isSecond) return null;
  const wrong = isFirst ? newer : older;
  throw new UsageError(
    `give two names of snapshots, or none: ${wrong === undefined ? `there is only ${older}` : `${wrong} is none`} (a PATH like a name is ./NAME)`,
  );
}

function guardOptions(given: Given) {
  const { flag } = given;
  const paths = given.all("path");
  if (given.positionals.length > 0)
    throw new UsageError(`too many arguments: ${given.positionals[0]}`);
  if (paths.length === 0 || !paths.every((path) => path.startsWith("/")))
    throw new UsageError("--path DIR, an absolute path, says what the key is for");
  limitTime(given);
  return {
    paths: paths.map((path) => withoutSlash(normalize(path))),
    source: flag("source"),
    allowRead: flag("allow-read"),
    allowDelete: flag("allow-delete"),
    maxBytes: parsedWith(given, "max-bytes", parseSize),
  };
}

function keepOptions(given: Given): KeepOptions {
  const [text, name, ...more] = given.positionals;
  if (text === undefined || name === undefined || more.length > 0)
    throw new UsageError(
      `${more.length > 0 ? "too many" : "missing"} arguments: give LOCATION and NAME`,
    );
  const note = parseNote(given.value("note") ?? "");
  return { ...commonOptions(given), location: readableLocation(text), name, note };
}

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

function copyOptions(given: Given) {
  if (given.positionals.length + given.all("optional").length + given.scopes.length < 2)
    throw new UsageError("missing arguments: give LOCATION and DEST…");
  return { ...runOptions(given), prefix: given.value("snapshot-prefix"), snapshot: false };
}

/** The options of setup that a run needs as well. */
const PASSED_ON = ["snapshot-folder", "snapshot-prefix", "ssh-opt", "timeout"] as const;
const FLAGS_PASSED_ON = ["sudo", "ssh-sudo"] as const;

/** What is to be set up; null where nothing is named. Errors: UsageError. */
function wantedSetup(given: Given): SetupWanted | null {
  const [first, ...rest] = given.positionals;
  const directory = given.value("config-dir");
  if (first === undefined && !given.flag("yes") && directory === null) return null;
  if (rest.length === 0)
    throw new UsageError(
      'missing arguments: give SOURCE and DEST…; "btrfs-backup setup" alone tells what they can be',
    );
  if (directory !== null && /[\x00-\x1f\x7f]/.test(directory))
    throw new UsageError("--config-dir cannot hold control characters");
  const valued = PASSED_ON.flatMap((name) =>
    given.all(name).map((value) => [name, value] as const),
  );
  const flags = FLAGS_PASSED_ON.filter((name) => given.flag(name));
  const destinations = new Map(rest.map(parseLocation).map((one) => [one.id, one]));
  return {
    source: folderLocation(first, "SOURCE"),
    destinations: [...destinations.values()],
    options: [...valued, ...flags.map((name) => [name, null] as const)],
    directory: directory === null ? null : resolve(directory),
  };
}

export function setupOptions(given: Given) {
  const { json } = commonOptions(given);
  const told = [
    ...(given.flag("quiet") ? ["--quiet"] : []),
    "--verbosity",
    verbosityOf(given),
    ...(json ? ["--json"] : []),
  ];
  return {
    json,
    yes: given.flag("yes"),
    wanted: wantedSetup(given),
    /** The options of a run with a proposed file. Errors: UsageError for what no file can hold. */
    runFrom({ file, lines, words }: Proposal, own: readonly string[]): RunOptions {
      const read = expandFiles([`@${file}`], () => lines.join("\n"));
      for (const [i, word] of words.entries())
        if (read[i] !== word)
          throw new UsageError(`a line of an argument file cannot hold "${word}"`);
      return runOptions(readArguments([...read, ...told, ...own], COMMANDS.run.args as ArgsDef));
    },
  };
}

/** A command, which first reads its options and then works. */
const command = <O>(
  name: CommandName,
  about: string,
  positionals: ArgsDef,
  [read, work]: readonly [
    read: (given: Given) => O,
    work: (options: O, report: Report) => Promise<void | number>,
  ],
): CommandDef<any> =>
  defineCommand({
    meta: {
      name: name === "run" ? "btrfs-backup" : `btrfs-backup ${name}`,
      version: VERSION,
      description: about,
    },
    args: { ...positionals, ...optionsOf(name) },
    async run({ data }: { data?: Given }) {
      const given = data as Given;
      const options = read(given);
      return concluded(given, (report) => work(options, report));
    },
  });

export const COMMANDS: Readonly<Record<CommandName, CommandDef<any>>> = {
  run: command(
    "run",
    "Incremental backups of btrfs subvolumes. The command can be left out: it is run.",
    {
      source: positional(`Subvolume to back up: ${PLACE}`),
      dest: positional(
        `Where to: ${PLACE}; streams to ${STORE}, or shell://COMMAND; any number`,
        false,
      ),
    },
    [runOptions, run],
  ),
  all: command(
    "all",
    "Run every source of this machine, several at a time: each argument file NAME.args of a directory.",
    {
      name: positional("The names of those to run (default: all); any number", false),
    },
    [allOptions, runAll],
  ),
  restore: command(
    "restore",
    "Make a subvolume again from a backup, or from a snapshot.",
    {
      location: positional(
        `Backups, or a source with its snapshots: ${PLACE}; or streams: ${STORE}`,
      ),
      target: positional(`The subvolume to make: ${PLACE}`),
    },
    [restoreOptions, restore],
  ),
  list: command(
    "list",
    "Show what there is of each snapshot, at a source and its destinations.",
    {
      location: positional(
        `A source (its known destinations are added), or backups: ${PLACE}; or streams: ${STORE}; any number (default: the SOURCE and the destinations of each argument file)`,
        false,
      ),
    },
    [
      (given) => (given.positionals.length === 0 ? listAllOptions(given) : listOptions(given)),
      (o, report) => ("members" in o ? listAll(o) : list(o, report)),
    ],
  ),
  verify: command(
    "verify",
    "Read every byte of what two places share, or of stored streams, and compare.",
    {
      source: positional(
        `Snapshots or backups: ${PLACE}; or streams, which are compared with their checksums: ${STORE}`,
      ),
      location: positional("What to compare with them; any number", false),
    },
    [verifyOptions, verify],
  ),
  versions: command(
    "versions",
    "Show every version of a file, or copy one back.",
    {
      file: positional(`File or directory in a source, which may be deleted: ${PLACE}`),
      location: positional(
        "Where to look besides the source's snapshots (default: its known destinations)",
        false,
      ),
    },
    [versionsOptions, versions],
  ),
  drill: command(
    "drill",
    "Prove that a backup can be restored: do it, compare or read every byte, and remove it again.",
    {
      location: positional(`Backups: ${PLACE}; or streams: ${STORE}`),
    },
    [drillOptions, drill],
  ),
  diff: command(
    "diff",
    "Show what changed between two snapshots, or since the newest one, and how many bytes were written.",
    {
      location: positional(`Backups, or a source with its snapshots: ${PLACE}`),
      name: positional(
        "The older one of two, as list shows them (default: the newest snapshot of a source, compared with now)",
        false,
      ),
      newer: positional("The newer one", false),
      path: positional("Only what is there or below, any number", false),
    },
    [diffOptions, diff],
  ),
  copy: command(
    "copy",
    "Send backups on to other places, as run does from a source.",
    {
      location: positional(
        `Backups: ${PLACE}; all prefixes one after the other, unless -p is given`,
      ),
      dest: positional("Where to; any number"),
    },
    [copyOptions, copy],
  ),
  prune: command(
    "prune",
    "Delete backups that a policy does not keep, by when they were received.",
    {
      location: positional(
        `Backups: ${PLACE}; or streams: ${STORE}; all prefixes one after the other, unless -p is given`,
      ),
    },
    [pruneOptions, prune],
  ),
  keep: command(
    "keep",
    "Let no retention delete one, until it is released.",
    {
      location: positional(
        `Backups, or a source with its snapshots: ${PLACE}; or streams: ${STORE}`,
      ),
      name: positional("The name of what is to stay, as list shows it"),
    },
    [keepOptions, keep],
  ),
  release: command(
    "release",
    "Leave to retention again what was kept.",
    {
      location: positional(
        `Backups, or a source with its snapshots: ${PLACE}; or streams: ${STORE}`,
      ),
      name: positional("The name of what was kept"),
    },
    [keepOptions, releaseKept],
  ),
  check: command(
    "check",
    "Tell whether the next run would do its work, and what needs care; change nothing.",
    {
      source: positional(
        `Subvolume that is backed up: ${PLACE} (default: the command line of each argument file)`,
        false,
      ),
      dest: positional("Where to, as for run; any number", false),
    },
    [
      (given) => (given.positionals.length === 0 ? checkAllOptions(given) : checkOptions(given)),
      (o, report) => ("members" in o ? checkAll(o) : checkRun(o, report)),
    ],
  ),
  guard: command(
    "guard",
    "Serve an ssh key, which may do no more than that, as the command of its line in authorized_keys.",
    {},
    [guardOptions, guard],
  ),
  unpin: command(
    "unpin",
    "Forget destinations, so that no snapshot is kept for them.",
    {
      source: positional("The subvolume that was backed up"),
      location: positional("Destinations to forget", false),
    },
    [unpinOptions, unpin],
  ),
  setup: command(
    "setup",
    "Propose a source's daily run, or make it; alone: show what to choose from.",
    {
      source: positional(`Subvolume to back up: ${PLACE}`, false),
      dest: positional("Where to, as for run; any number", false),
    },
    [setupOptions, setup],
  ),
};
const isCommand = (word: string): word is CommandName => Object.hasOwn(COMMANDS, word);

/**
 * Words in lines of so many columns. Each line but the first begins with as many blanks as `first`
 * is long.
 */
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

/** An argument as help, man page and completions tell it: an option or a positional. */
export type ToldArgument = {
  readonly name: string;
  readonly short: string | null;
  readonly hint: string | null;
  readonly description: string;
  readonly required: boolean;
  readonly repeatable: boolean;
};

/** All that help, man page and completions tell of a command. */
export function manualOf(one: CommandDef<any>) {
  const { name: title = "", description: about = "" } = one.meta as CommandMeta;
  const all = Object.entries(one.args as Readonly<Record<string, Definition>>);
  const tell = ([name, definition]: Defined): ToldArgument => {
    const { alias, valueHint, description = "", required } = definition;
    const option = OPTIONS.get(name);
    return {
      name,
      short: alias ?? null,
      hint: valueHint ?? null,
      description,
      required: required !== false,
      repeatable: (option?.repeatable ?? option?.perDest) === true,
    };
  };
  const positionals = all.filter(([, { type }]) => type === "positional").map(tell);
  const options = all.filter(([, { type }]) => type !== "positional").map(tell);
  const words = positionals.map(({ name, required, description }) => {
    const word = `${name.toUpperCase()}${/any number/.test(description) ? "…" : ""}`;
    return required ? word : `[${word}]`;
  });
  return {
    usage: [title, "[OPTIONS]", ...words].join(" "),
    description: about,
    positionals,
    groups: Object.entries(GROUPS)
      .map(([heading, group]): [string, ToldArgument[]] => [
        heading,
        options.filter(({ name }) => Object.hasOwn(group, name)),
      ])
      .filter(([, some]) => some.length > 0),
  };
}

/** Commands to begin with. Help tells them first, and the man page tells them all. */
export const EXAMPLES: Readonly<Record<CommandName, Readonly<Record<string, string>>>> = {
  run: {
    "btrfs-backup /home /backup/home": "Take a snapshot of /home, and send what changed to a disk",
    "btrfs-backup -N 7d -n '14d+ 8w 12m' /home /backup/home ssh://nas/backup/home":
      "To another host as well; both sides keep what the policies say",
    "btrfs-backup --encrypt-to me@example.org /home rclone://s3:bucket/home":
      "Encrypted, to an object store",
    "btrfs-backup --dry-run /home /backup/home": "What would happen, and why",
  },
  restore: {
    "btrfs-backup restore /backup/home /home.restored": "The newest backup, as a new subvolume",
    "btrfs-backup restore --replace --before '2026-01-31 12:00' /backup/home /home":
      "As it was at noon, in the place of /home, which is kept beside",
    "btrfs-backup restore --path me/letters raw:///backup/home /tmp/letters":
      "One directory of the newest backup",
  },
  all: {
    "btrfs-backup all": "What each file /etc/btrfs-backup/NAME.args says, as the daily timer does",
    "btrfs-backup all --dry-run home root": "What two of them would do, and why",
  },
  check: {
    "btrfs-backup check /home /backup/home": "Whether the next run would do its work",
    "btrfs-backup check @/etc/btrfs-backup/home.args": "The same, as an argument file says",
  },
  setup: {
    "btrfs-backup setup": "What could be backed up, and where to",
    "btrfs-backup setup --yes /home /backup/home":
      "An argument file for /home, the daily runs, and the first one",
  },
  list: {
    "btrfs-backup list": "What there is of every source that has an argument file",
    "btrfs-backup list /home": "What /home and its destinations have of each snapshot",
    "btrfs-backup list --max-age 2d /backup/home": "Fail if the newest backup is too old",
  },
  verify: {
    "btrfs-backup verify /home /backup/home": "Compare the newest snapshot with its backup",
    "btrfs-backup verify --all raw:///backup/home": "Read all stored streams",
  },
  versions: {
    "btrfs-backup versions /home/me/letter": "Which versions of a file there are, and where",
    "btrfs-backup versions --get '2026-01-31 12:00' /home/me/letter": "The file as it was then",
  },
  drill: {
    "btrfs-backup drill /backup/home": "Whether the newest backup on a disk here can be restored",
    "btrfs-backup drill --random --scratch /mnt/spare rclone://s3:bucket/home":
      "The same for any one of an object store, which is received to /mnt/spare for that",
  },
  diff: {
    "btrfs-backup diff /home": "What has changed since the newest snapshot",
    "btrfs-backup diff --summary /backup/home 20260101-030000 20260102-030000":
      "Which directories made a backup large",
  },
  copy: {
    "btrfs-backup copy /backup/home /mnt/second/home": "What the second disk lacks",
    "btrfs-backup copy -n 12m /backup ssh://away/backup": "All prefixes, to another host",
  },
  prune: {
    "btrfs-backup prune --dry-run -n '14d+ 8w' /backup/home": "What would go, and why",
    "btrfs-backup prune -n '14d+ 8w' ssh://nas/backup/home": "Delete it, on another host",
  },
  keep: {
    "btrfs-backup keep --note 'before the upgrade' /backup/home 20260131-120000":
      "No retention deletes this backup any more",
    "btrfs-backup keep raw:///backup/home 20260131-120000":
      "A stored stream, with all that it builds on",
  },
  release: {
    "btrfs-backup release /backup/home 20260131-120000": "Retention may delete it again",
    "btrfs-backup release /home 20260131-120000": "The same for a source's own snapshot",
  },
  guard: {
    'command="btrfs-backup guard --path /backup/laptop",restrict ssh-ed25519 AAAA…':
      "A line of ~/.ssh/authorized_keys: the key can add backups there, and no more",
    "btrfs-backup guard --path /backup/laptop --allow-read":
      "As that command: it can restore and verify as well",
  },
  unpin: {
    "btrfs-backup unpin /home ssh://nas/backup/home": "Keep nothing for that destination any more",
    "btrfs-backup unpin --all /home": "Forget all destinations",
  },
};

const POLICIES =
  "A POLICY is a number of the newest to keep, or words: 24h 7d 4w 12m 10y keep the first of each of so many hours, days, weeks, months and years; 14d+ keeps all of 14 days; * stands for all.";
export const EXIT_STATUS = {
  "0": "All is done.",
  "1": "Something failed; what could be done is done.",
  "2": "The command line makes no sense; nothing was done.",
  "3": "Another run holds the lock; nothing was done.",
  "of all":
    "The worst of its sources, 2 before 1 before 3: a file that makes no sense, or one that fails, stops no other.",
  "129, 130, 143": "Ended by SIGHUP, SIGINT or SIGTERM, after cleaning up.",
};
export const ENVIRONMENT = {
  NO_COLOR: "No colours.",
  PAGER: "Shows the manual (default: less).",
  XDG_RUNTIME_DIR: "Where the sockets of ssh are (else /run or /tmp).",
};

/** The text of --help for a command; with `everything`, that of --help-all. */
export function helpText(one: CommandDef<any>, columns: number, everything: boolean): string {
  const { usage, description: about, positionals, groups } = manualOf(one);
  const width = Math.min(columns, 100);
  const row = (term: string, text: string) =>
    term.length > 24
      ? `  ${term}\n${wrapped(" ".repeat(28), text, width)}`
      : wrapped(`  ${term}`.padEnd(28), text, width);
  const section = (title: string, rows: readonly string[]) =>
    rows.length === 0 ? "" : `\n${title}${rows.join("")}`;
  const commandName = (Object.keys(COMMANDS) as CommandName[]).find(
    (name) => COMMANDS[name] === one,
  );
  const examples = Object.entries(EXAMPLES[commandName ?? "run"]);
  const others = Object.entries(one === COMMANDS.run ? COMMANDS : {}).slice(1);
  const options = groups.flatMap(([, some]) => some);
  const isShort = !everything && options.some(({ name }) => name === "help-all");
  const optionRows = (some: readonly ToldArgument[]) =>
    some.map((option) => row(spelledOption(option), option.description));
  const told = options.filter(({ name }) => OPTIONS.get(name)?.common === true);
  return [
    wrapped("Usage: ", usage, width),
    `\n${wrapped("", about, width)}`,
    section(
      "Examples:\n",
      examples.map(([line, text]) => `  ${line}\n${wrapped(" ".repeat(6), text, width)}`),
    ),
    section(
      "",
      positionals.map(({ name, description }) => row(name.toUpperCase(), description)),
    ),
    section("Other commands, each with its own --help:\n", [
      ...others.map(([name, { meta }]) =>
        row(name, (meta as CommandMeta).description?.split(/[,.]/)[0] ?? ""),
      ),
      ...(others.length === 0 ? [] : [row("help", "The manual; alone, its topics")]),
    ]),
    ...(isShort
      ? [section("Options that many need; --help-all shows all:\n", optionRows(told))]
      : groups.map(([title, some]) => section(`${title}:\n`, optionRows(some)))),
    options.some(({ hint }) => hint === "POLICY") ? `\n${wrapped("", POLICIES, width)}` : "",
    `\n${wrapped("Exit status: ", shortly(EXIT_STATUS), width)}`,
    wrapped("Environment: ", shortly(ENVIRONMENT), width),
  ].join("");
}

const spelledOption = ({ name, short, hint }: ToldArgument) =>
  `${short === null ? "    " : `-${short}, `}--${name}${hint === null ? "" : ` ${hint}`}`;

/** Words with what they mean, in a line. */
const shortly = (entries: Readonly<Record<string, string>>) =>
  `${Object.entries(entries)
    .map(([term, text]) => `${term}: ${text.charAt(0).toLowerCase()}${text.slice(1, -1)}`)
    .join("; ")}.`;

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
    return statusAfter(error);
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

/** The nearest of some words, and how far it is. */
const nearest = (word: string, words: readonly string[]) =>
  words
    .map((other) => ({ word: other, far: editDistance(word, other) }))
    .sort((a, b) => a.far - b.far)[0] ?? { word: "", far: Infinity };

/** Names of commands elsewhere, with ours. */
const ELSEWHERE: Readonly<Record<string, string>> = {
  status: "list",
  ls: "list",
  snapshots: "list",
  backup: "run",
  send: "run",
};

/**
 * Errors: UsageError for a first word that is neither a command nor a path, but nearly a command.
 */
function notMisspelt(word: string): void {
  if (!/^[a-z]{2,12}$/.test(word) || isCommand(word) || word === "help") return;
  const best = nearest(word, Object.keys(COMMANDS));
  const most = best.word.length > 3 ? 2 : 1; // "mail" and "all" are not alike
  const meant = ELSEWHERE[word] ?? (best.far <= most ? best.word : undefined);
  if (meant !== undefined)
    throw new UsageError(
      `there is no command ${word}; did you mean "btrfs-backup ${meant}"? (A directory of that name is ./${word}; "btrfs-backup --help" tells all commands)`,
    );
}

const FIRST_WORDS = `btrfs-backup: incremental backups of btrfs subvolumes

  btrfs-backup -N 5 -n '7d 4w 12m' /home /mnt/disk/home     take a snapshot of /home, and send it
  btrfs-backup list /home                                   what there is, here and there
  btrfs-backup restore /mnt/disk/home /home.restored        get it back

"btrfs-backup --help" tells all options, "btrfs-backup COMMAND --help" those of another
command, and "btrfs-backup help" the manual. Commands: ${Object.keys(COMMANDS)
  .filter((name) => name !== "run")
  .join(", ")}.
`;

// ── the manual ──

/** The manual in what scripts/build builds: its files as `manualFiles` has them, gzip, base64. */
declare const MANUAL: string | undefined;

/**
 * The files of scripts/manual by their names. Built into the program, or beside its source; null
 * where they are neither.
 */
async function manualFiles(): Promise<ReadonlyMap<string, string> | null> {
  if (typeof MANUAL === "string") {
    const { gunzipSync } = await import("node:zlib");
    const files = gunzipSync(Buffer.from(MANUAL, "base64")).toString().split("\f").slice(1);
    return new Map(
      files.map((file) => {
        const end = file.indexOf("\n");
        return [file.slice(0, end), file.slice(end + 1)];
      }),
    );
  }
  const directory = join(dirname(fileURLToPath(import.meta.url)), "scripts/manual");
  if (!existsSync(directory)) return null;
  return new Map(
    readdirSync(directory)
      .filter((name) => name.endsWith(".md"))
      .map((name) => [name, readFileSync(join(directory, name), "utf8")]),
  );
}

/** A chapter of the manual. */
export type Chapter = {
  /** What `help` calls it, and its file. */
  readonly topic: string;
  readonly title: string;
  /** Whether it belongs to the guide, or to the reference beside all options. */
  readonly part: "guide" | "reference";
  readonly text: string;
};

/** The chapters in their order, which the table of contents has. */
export function chaptersOf(files: ReadonlyMap<string, string>): Chapter[] {
  const [guide = "", reference = ""] = (files.get("README.md") ?? "").split("\n## Reference\n");
  const chapters = (contents: string, part: Chapter["part"]) =>
    [...contents.matchAll(/^- \[(.*)\]\((.*)\.md\)/gm)].map(([, title = "", topic = ""]) => {
      const text = files.get(`${topic}.md`) ?? "";
      return { topic, title, part, text: text.replace(/^# .*\n+/, "") };
    });
  return [...chapters(guide, "guide"), ...chapters(reference, "reference")];
}

/** A piece of a chapter. */
export type Block =
  | { readonly kind: "heading"; readonly text: string }
  | { readonly kind: "paragraph"; readonly text: string }
  | { readonly kind: "item"; readonly mark: string; readonly text: string }
  /** Commands, files, and what a program prints; `info` is what stands behind the fence. */
  | { readonly kind: "code"; readonly info: string; readonly text: string }
  | { readonly kind: "table"; readonly rows: readonly (readonly string[])[] };

/** The blocks of a text in the Markdown that the manual is written in. */
export function blocksOf(text: string): Block[] {
  // Every third piece is what stands behind a fence, the next one what it holds.
  const pieces = text.split(/^```(.*)\n([^]*?)^```$/m);
  return pieces.flatMap((piece, i): Block[] => {
    if (i % 3 === 1) return [{ kind: "code", info: piece, text: pieces[i + 1] ?? "" }];
    return i % 3 === 2
      ? []
      : piece
          .trim()
          .split(/\n{2,}/)
          .flatMap(blocksIn);
  });
}

/** The blocks in lines without an empty one. */
function blocksIn(lines: string): Block[] {
  const flowing = (some: string) => some.replace(/\s*\n\s*/g, " ").trim();
  if (lines === "" || lines.startsWith("<!--")) return [];
  const heading = /^#+ (.*)$/.exec(lines)?.[1];
  if (heading !== undefined) return [{ kind: "heading", text: heading }];
  if (lines.startsWith("|")) {
    const [head = [], , ...rows] = lines.split("\n").map((line) =>
      line
        .split(/(?<!\\)\|/)
        .slice(1, -1)
        .map((cell) => cell.trim().replaceAll("\\|", "|")),
    );
    return [{ kind: "table", rows: [head, ...rows] }];
  }
  if (!/^(-|\d+\.) /.test(lines)) return [{ kind: "paragraph", text: flowing(lines) }];
  return lines.split(/\n(?=(?:-|\d+\.) )/).map((one) => {
    const [, mark = "-", rest = ""] = /^(\S+) ([^]*)$/.exec(one) ?? [];
    return { kind: "item", mark, text: flowing(rest) };
  });
}

/** A stretch of a text, and how it looks. */
export type Stretch = { readonly text: string; readonly look: "plain" | "strong" | "code" };

/** The stretches of a text, without the marks of Markdown. A link to a chapter says its topic. */
export const stretchesOf = (text: string): Stretch[] =>
  text
    .split(/(`[^`]+`|\*\*[^*]+\*\*|(?<![\w*])\*[^\s*]+\*)/)
    .filter((piece) => piece !== "")
    .map((piece): Stretch => {
      if (piece.startsWith("`")) return { text: piece.slice(1, -1), look: "code" };
      const isStrong = piece.startsWith("*");
      const linked = (isStrong ? piece.replaceAll(/^\*+|\*+$/g, "") : piece)
        .replaceAll(/\[(.*?)\]\(([a-z-]+)\.md\)/g, "$1 (btrfs-backup help $2)")
        .replaceAll(/\[(.*?)\]\(.*?\)/g, "$1");
      return { text: linked, look: isStrong ? "strong" : "plain" };
    });

/** A chapter as a terminal shows it, in lines of so many columns. */
export function chapterText({ title, text }: Chapter, columns: number, colours: boolean): string {
  const width = Math.min(columns, 100);
  const strong = (words: string) => (colours ? `\x1b[1m${words}\x1b[0m` : words);
  const told = (words: string) =>
    stretchesOf(words)
      .map((one) => one.text)
      .join("");
  const indented = (lines: string) => lines.replace(/^(?=.)/gm, "      ");
  const shown = (block: Block): string => {
    if (block.kind === "heading") return `  ${strong(told(block.text))}\n`;
    if (block.kind === "paragraph") return wrapped("    ", told(block.text), width);
    if (block.kind === "item") return wrapped(`    ${block.mark} `, told(block.text), width);
    if (block.kind === "code") return indented(block.text);
    const rows = block.rows.map((row) => row.map(told));
    const table = indented(alignedTable(rows));
    if (table.split("\n").every((line) => line.length <= width)) return table;
    const [head = [], ...others] = rows;
    return others.map((row) => rowText(head, row, width)).join("");
  };
  const blocks = blocksOf(text);
  const all = blocks.map((block, i) => {
    const follows = block.kind === "item" && blocks[i - 1]?.kind === "item";
    return `${follows ? "" : "\n"}${shown(block)}`;
  });
  return `${strong(title.toUpperCase())}\n${all.join("")}`;
}

/** A row of a table that is too wide: its first cell, and below it the others with their heads. */
function rowText(
  head: readonly string[],
  [first = "", ...cells]: readonly string[],
  width: number,
) {
  const label = (i: number) => (cells.length === 1 ? "" : `${head[i + 1] ?? ""}: `);
  const shown = cells.map((cell, i) => wrapped("        ", `${label(i)}${cell}`, width));
  return `${wrapped("    ", first, width)}${shown.join("")}`;
}

/** Shows a text, on a terminal through the pager that the user likes, as git does. */
function showText(text: string): void {
  const { PAGER } = process.env;
  const lines = text.split("\n").length;
  const pager = PAGER ?? (which.sync("less", { nothrow: true }) === null ? "" : "less");
  if (
    !process.stdout.isTTY ||
    lines <= (process.stdout.rows ?? 0) ||
    /^\s*(cat)?\s*$/.test(pager)
  ) {
    process.stdout.write(text);
    return;
  }
  const env = { LESS: "FRX", ...process.env };
  const { status } = spawnSync("sh", ["-c", pager], {
    input: text,
    stdio: ["pipe", "inherit", "inherit"],
    env,
  });
  if (status === 127) process.stdout.write(text);
}

const topicRows = (chapters: readonly Chapter[], part: Chapter["part"]) =>
  chapters
    .filter((chapter) => chapter.part === part)
    .map(({ topic, title }) => `  ${topic.padEnd(16)}${title}\n`)
    .join("");

const columnsOfOutput = () => process.stdout.columns || 80;

/** `help`, alone or with a command or a topic of the manual. Errors: UsageError. */
async function tellHelp([topic, ...more]: readonly string[]): Promise<number> {
  if (more.length > 0) throw new UsageError("help takes one topic or command");
  if (isCommand(topic ?? "")) {
    process.stdout.write(helpText(COMMANDS[topic as CommandName], columnsOfOutput(), false));
    return 0;
  }
  const files = await manualFiles();
  if (files === null)
    throw new UsageError(
      "the manual is not beside this file: it is in scripts/manual of the project, and in the man pages btrfs-backup(8) and btrfs-backup-guide(7)",
    );
  const chapters = chaptersOf(files);
  if (topic === undefined) {
    const commands = wrapped("  ", Object.keys(COMMANDS).join(" "), 80);
    process.stdout.write(
      `btrfs-backup help TOPIC tells of\n\n${topicRows(chapters, "guide")}\n${topicRows(chapters, "reference")}\n"btrfs-backup help guide" is all of it, and "btrfs-backup help COMMAND" the options of\n${commands}`,
    );
    return 0;
  }
  const wanted = chapters.filter((one) => topic === "guide" || one.topic === topic);
  if (wanted.length === 0) {
    const words = [...chapters.map((one) => one.topic), ...Object.keys(COMMANDS)];
    const { word, far } = nearest(topic, words);
    throw new UsageError(
      `there is no topic or command ${topic}${far <= 3 ? `; did you mean ${word}?` : ""} ("btrfs-backup help" tells all)`,
    );
  }
  const columns = columnsOfOutput();
  const colours = process.stdout.isTTY && (process.env["NO_COLOR"] ?? "") === "";
  showText(wanted.map((one) => chapterText(one, columns, colours)).join("\n"));
  return 0;
}

/** Runs a command line, and returns the exit status. Errors: UsageError. */
async function obey(given: readonly string[]): Promise<number> {
  if (given[0] === undefined) {
    process.stderr.write(FIRST_WORDS);
    return 2;
  }
  notMisspelt(given[0]);
  if (given[0] === "help") return tellHelp(given.slice(1));
  const [first = "", ...rest] = given;
  const isNamed = isCommand(first);
  const cmd = COMMANDS[isNamed ? first : "run"];
  const options = readArguments(isNamed ? rest : given, cmd.args as ArgsDef);
  const [location = ""] = options.positionals;
  if (!isNamed && isCommand(location))
    throw new UsageError(`the command comes first: btrfs-backup ${location} …`);
  if (options.flag("version")) console.log(versionText());
  else if (options.flag("help") || options.flag("help-all"))
    process.stdout.write(helpText(cmd, columnsOfOutput(), options.flag("help-all")));
  else {
    const context = { rawArgs: [...given], args: { _: [] } as never, cmd, data: options };
    return (await cmd.run?.(context)) as number;
  }
  return 0;
}

/** The program, from its arguments to its exit status. */
export async function main(args: readonly string[]): Promise<number> {
  try {
    if (!canEnter("."))
      throw new UsageError(
        "this user cannot enter the current directory: start in another, such as /",
      );
    inUtf8(readFileSync("/proc/self/cmdline"), "an argument");
    return await obey(expandFiles(args, (path) => inUtf8(readFileSync(path), "it")));
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
  // Where nobody reads the events any more, the work is done all the same, but the exit status is
  // not 0.
  let unheard = false;
  process.stdout.on("error", () => (unheard = true));
  const status = await main(process.argv.slice(2));
  // A pipe may still be full, and its reader asleep: a signal ends the program at once, and
  // LIMITS.parting does.
  const written = new Promise<void>((done) =>
    process.stdout.on("error", () => done()).end(() => done()),
  );
  const isHeard = await Promise.race([
    isOverWithin(LIMITS.parting, written),
    signalled.then(() => isOverWithin(500, written)),
  ]);
  process.exit(status || statusOfSignal() || (isHeard && !unheard ? 0 : 1));
}
