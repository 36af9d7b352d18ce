// Ten years of hourly runs, with destinations that come and go and fail half-way, under a clock
// that skips an hour each spring and repeats one each autumn. What decides is the program's own:
// the functions that `run` calls, in its order. What is checked is written anew, and plainly.
// SEED=… repeats a simulation.

import { expect, test } from "bun:test";
import {
  newestShared,
  parseName,
  parsePolicy,
  leapsAmong,
  planDestination,
  planSource,
  planStreams,
  planTransfers,
  standingIn,
  type Backup,
  type Claimant,
  type Decision,
  type Pin,
  type Snapshot,
  type Transfer,
} from "../btrfs-backup.ts";
import { named } from "./support/names.ts";
import { generator } from "./support/random.ts";

const SEED =
  process.env["SEED"] === undefined
    ? Math.floor(Math.random() * 2 ** 32)
    : Number(process.env["SEED"]);
console.log(`simulation: SEED=${SEED}`);

const HOUR = 3600e3;
const TEN_YEARS = 87_600;

// ── The clock: Central European time ─────────────────────────────────────────────────────

/** When the clocks change: 01:00 UTC on a month's last Sunday. */
function lastSunday(year: number, month: number): number {
  const last = new Date(Date.UTC(year, month + 1, 0, 1));
  return last.getTime() - last.getUTCDay() * 24 * HOUR;
}

function localTime(utc: number): number {
  const year = new Date(utc).getUTCFullYear();
  const summer = utc >= lastSunday(year, 2) && utc < lastSunday(year, 9);
  return utc + (summer ? 2 : 1) * HOUR;
}

const nameOf = (local: number) =>
  new Date(local).toISOString().slice(0, 19).replace(/[-:]/g, "").replace("T", "-");

// ── The policy, said again: by comparing pieces of names ─────────────────────────────────

const weeks = new Map<string, string>();
/** The ISO week of a day as text: it belongs to the year that its Thursday is in. */
function isoWeek(day: string): string {
  let week = weeks.get(day);
  if (week === undefined) {
    const date = new Date(`${day.slice(0, 4)}-${day.slice(4, 6)}-${day.slice(6, 8)}T00:00:00Z`);
    date.setUTCDate(date.getUTCDate() + 4 - (date.getUTCDay() || 7));
    const year = date.getUTCFullYear();
    week = `${year}-W${Math.ceil(((date.getTime() - Date.UTC(year, 0, 1)) / (24 * HOUR) + 1) / 7)}`;
    weeks.set(day, week);
  }
  return week;
}

const PERIOD_OF: Record<string, (name: string) => string> = {
  h: (name) => name.slice(0, 11),
  d: (name) => name.slice(0, 8),
  w: (name) => isoWeek(name.slice(0, 8)),
  m: (name) => name.slice(0, 6),
  y: (name) => name.slice(0, 4),
};
const HOURS_IN: Record<string, number> = { h: 1, d: 24, w: 168 };

/** The names that a policy keeps of these, oldest first. */
function keptNames(names: readonly string[], policy: string): Set<string> {
  const newest = names.at(-1);
  if (newest === undefined) return new Set();
  const kept = new Set([newest]);
  for (const word of policy.split(" ")) {
    if (word === "0") names.forEach((name) => kept.add(name));
    else if (/^\d+$/.test(word)) names.slice(-Number(word)).forEach((name) => kept.add(name));
    else if (word.endsWith("+")) {
      const hours = Number.parseInt(word) * (HOURS_IN[word.at(-2) ?? ""] ?? NaN); // the calendar's own words are not simulated
      const [, y, mo, d, h, mi, sec] = /^(....)(..)(..)-(..)(..)(..)$/.exec(newest) ?? [];
      const end = Date.parse(`${y}-${mo}-${d}T${h}:${mi}:${sec}Z`);
      const from = nameOf(end - hours * HOUR);
      for (const name of names) if (name >= from) kept.add(name);
    } else {
      const periodOf = PERIOD_OF[word.at(-1) as string] as (name: string) => string;
      const firsts: Record<string, string> = {};
      for (const name of names) firsts[`~${periodOf(name)}`] ??= name;
      const all = Object.values(firsts);
      for (const name of word.startsWith("*") ? all : all.slice(-Number.parseInt(word)))
        kept.add(name);
    }
  }
  return kept;
}

// ── The world ────────────────────────────────────────────────────────────────────────────

type Plan = {
  readonly runs: number;
  readonly source: string;
  readonly keepUnsent: boolean;
  /** Seconds that a run can be late, so that names really go back in autumn. */
  readonly late: number;
  /** Compare what is left with all that ever arrived: only where names never go back. */
  readonly compareHistory: boolean;
  readonly destinations: readonly {
    readonly id: string;
    readonly policy: string;
    readonly kind?: "command";
    readonly since?: number;
    readonly goesAway: number;
    readonly fails: number;
    readonly longest: number;
  }[];
};

/** A destination as it really is, whether it can be reached or not. */
type Place = {
  readonly plan: Plan["destinations"][number];
  backups: Backup[];
  leftover: Backup | null;
  awayUntil: number;
  /** Names of all that ever arrived. */
  readonly history: string[];
  /** Numbers of what is there; of a command, which cannot be asked, only the last. */
  readonly arrived: Set<number>;
};

/** Every snapshot has a number that grows, and what was received from it has the same: the truth, which the program does not see. */
type Numbered = Snapshot & { readonly number: number };
const serial = (entry: Snapshot) => (entry as Numbered).number;
const goes = (decisions: readonly Decision<Snapshot>[]) =>
  new Set(decisions.filter(({ reasons }) => reasons.length === 0).map(({ entry }) => entry.name));
const same = (a: ReadonlySet<string>, b: ReadonlySet<string>) =>
  a.size === b.size && [...a].every((x) => b.has(x));

/** In the source's order what it still has, the rest by name. */
function inOrder(entries: readonly Snapshot[], source: ReadonlySet<number>): string[] {
  const sorted = [...entries].sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0));
  const both = sorted
    .filter((entry) => source.has(serial(entry)))
    .sort((a, b) => serial(a) - serial(b));
  return sorted.map(
    (entry) => (source.has(serial(entry)) ? (both.shift() as Snapshot) : entry).name,
  );
}

function simulate(plan: Plan, random: () => number) {
  const tally = {
    runs: 0,
    repeatedHours: 0,
    skippedHours: 0,
    absences: 0,
    failures: 0,
    leftovers: 0,
    transfers: 0,
    full: 0,
    deletions: 0,
    freezes: 0,
    leaps: 0,
    histories: 0,
    most: 0,
  };
  const chance = (p: number) => random() < p;
  const below = (n: number) => Math.floor(random() * n);
  let snapshots: Snapshot[] = [];
  let nextId = 256;
  const places = plan.destinations.map((destination): Place => ({
    plan: destination,
    backups: [],
    leftover: null,
    awayUntil: destination.since ?? 0,
    history: [],
    arrived: new Set(),
  }));
  /** What the record at the source says. */
  const known = new Map<string, { pin: Pin | null }>();
  const policies = new Map(plan.destinations.map(({ id, policy }) => [id, parsePolicy(policy)]));
  const sourcePolicy = parsePolicy(plan.source);
  let before = "";

  for (let run = 0; run < plan.runs; run++) {
    const must = (fine: boolean, promise: string, detail: () => unknown = () => "") => {
      if (!fine)
        throw new Error(
          `run ${run} at ${before} (SEED=${SEED}): ${promise} ${JSON.stringify(detail())}`,
        );
    };

    // The snapshot: when its name exists, the next free second.
    let local = localTime(Date.UTC(2023, 11, 31, 23) + run * HOUR) + below(plan.late + 1) * 1000;
    let name = nameOf(local);
    while (snapshots.some((snapshot) => snapshot.name === name)) name = nameOf((local += 1000));
    const time = parseName(name, "") as number;
    must(time === local, "a name is its time");
    const repeated = before.slice(0, 11) === name.slice(0, 11);
    if (repeated) tally.repeatedHours++;
    // Plain is slow: long lists are compared in one run of seven, and when the clocks went back. Invariants are checked in every run.
    const compared = (entries: readonly Snapshot[]) =>
      entries.length <= 40 || repeated || run % 7 === 0;
    if (snapshots.length > 0 && time - (parseName(before, "") as number) > 1.5 * HOUR)
      tally.skippedHours++;
    before = name;
    const taken: Numbered = {
      number: run,
      id: nextId++,
      name: named(name),
      time,
      moment: time,
      path: `snapshot/${name}`,
      uuid: `s${run}`,
      parentUuid: "source",
      receivedUuid: null,
      readonly: true,
    };
    snapshots = [...snapshots, taken];
    const atSource = new Set(snapshots.map(serial));

    // Each destination in turn; sometimes one is not on the command line.
    const notGiven = chance(0.02) ? places[below(places.length)] : undefined;
    const served = new Map<string, { done: boolean }>();
    for (const place of places) {
      const { id, kind, goesAway, fails, longest } = place.plan;
      if (place === notGiven) continue;
      if (run >= place.awayUntil && chance(goesAway))
        place.awayUntil = run + 1 + below(chance(0.05) ? longest : Math.min(longest, 48));
      if (run < place.awayUntil) {
        tally.absences++;
        continue;
      }
      const memory = known.get(id)?.pin ?? null;
      const entries = place.leftover ? [...place.backups, place.leftover] : place.backups;
      let standing = standingIn(
        {
          standing: entries,
          snapshots: entries,
          entries: new Set(entries.map((entry) => entry.name)),
          prefix: "",
        },
        {},
        place.leftover ? [place.leftover.name] : [],
      );
      const policy = policies.get(id) ?? null;
      const { transfers, conflicts } =
        kind === "command"
          ? {
              transfers: planStreams(snapshots, memory, {
                incremental: true,
                newestOnly: false,
                prefix: "",
              }),
              conflicts: [],
            }
          : planTransfers(snapshots, standing, {
              policy,
              incremental: true,
              newestOnly: false,
              now: time,
              fullEvery: null,
            });
      must(conflicts.length === 0, "no name is in the way of another", () => conflicts);
      checkTransfers(place, transfers, must);

      // All of them succeed, or one of them fails and may leave half of itself.
      const failing = chance(fails) ? below(transfers.length) : -1;
      if (place.leftover !== null) {
        place.leftover = null; // cleared away before anything is sent
        tally.leftovers++;
      }
      for (const [i, { snapshot, parent }] of transfers.entries()) {
        if (i === failing) {
          if (kind !== "command" && chance(0.5))
            place.leftover = {
              ...snapshot,
              id: nextId++,
              uuid: `left${run}`,
              receivedUuid: null,
              readonly: false,
            };
          break;
        }
        tally.transfers++;
        if (parent === null) tally.full++;
        if (kind === "command") place.arrived.clear();
        place.arrived.add(serial(snapshot));
        place.history.push(snapshot.name);
        const arrived: Backup = { ...snapshot, receivedUuid: snapshot.uuid };
        standing = {
          ...standing,
          held: [...standing.held, arrived],
          backups: [...standing.backups, arrived],
        };
        if (kind === "command")
          known.set(id, { pin: { name: snapshot.name, uuid: snapshot.uuid } });
        else
          place.backups = [
            ...place.backups,
            { ...arrived, id: nextId++, uuid: `${id}${serial(snapshot)}` },
          ];
      }
      if (failing !== -1) tally.failures++;
      served.set(id, { done: failing === -1 });

      // Its retention, only if it got everything.
      if (failing === -1 && kind !== "command") {
        const gone = goes(planDestination(snapshots, standing, { policy, now: time }));
        const stays = place.backups.filter((backup) => !gone.has(backup.name));
        checkDestination(place, stays, must);
        tally.deletions += place.backups.length - stays.length;
        for (const backup of place.backups)
          if (gone.has(backup.name)) place.arrived.delete(serial(backup));
        place.backups = stays;
      }
      const pin =
        kind === "command" ? (known.get(id)?.pin ?? null) : newestShared(snapshots, standing.held);
      if (pin !== null || known.has(id))
        known.set(id, { pin: pin && { name: pin.name, uuid: pin.uuid } });
    }

    // Retention at the source.
    const claimants = places
      .filter((place) => place !== notGiven || known.has(place.plan.id))
      .map(({ plan: { id, kind } }, _, all): Claimant => {
        const result = served.get(id);
        const given = id !== notGiven?.plan.id && all.length > 0;
        const unread = given && (result === undefined || (kind === "command" && !result.done));
        return {
          id,
          pin: known.get(id)?.pin ?? null,
          unread,
          unsentPolicy:
            plan.keepUnsent && given && !result?.done ? { policy: policies.get(id) ?? null } : null,
        };
      });
    const gone = goes(planSource(snapshots, claimants, { policy: sourcePolicy, now: time }));
    const stays = snapshots.filter((snapshot) => !gone.has(snapshot.name));
    checkSource(stays, claimants, must);
    tally.deletions += gone.size;
    snapshots = stays;
    tally.runs++;
    tally.most = Math.max(
      tally.most,
      snapshots.length,
      ...places.map(({ backups }) => backups.length),
    );

    /** After a long absence, what came before it stays for some days: nothing that should stay has gone. */
    function leapt(
      entries: readonly Snapshot[],
      left: ReadonlySet<string>,
      keeps: ReadonlySet<string>,
    ): boolean {
      tally.leaps++;
      return (
        leapsAmong(entries.toSorted((a, b) => serial(a) - serial(b))).length > 0 &&
        [...keeps].every((name) => left.has(name))
      );
    }

    /** Only what is missing and wanted, oldest first, each against the closest earlier one on both sides. */
    function checkTransfers(
      { plan: { id, policy, kind }, backups, arrived }: Place,
      transfers: readonly Transfer[],
      must: Must,
    ): void {
      must(transfers.at(-1)?.snapshot === taken, `${id} is sent the newest, last`);
      const there = new Set(arrived);
      for (const { snapshot, parent } of transfers) {
        const closest = snapshots.findLast(
          (earlier) => serial(earlier) < serial(snapshot) && there.has(serial(earlier)),
        );
        must(
          parent === (closest ?? null),
          `the parent of what ${id} is sent is the closest`,
          () => [snapshot.name, parent?.name, closest?.name],
        );
        must(
          parent !== null || there.size === 0,
          `only the first transfer to ${id} is in full`,
          () => snapshot.name,
        );
        there.add(serial(snapshot));
      }
      if (kind !== "command" && !compared([...backups, ...snapshots])) return;
      const gone = backups.filter((backup) => !atSource.has(serial(backup)));
      const keeps =
        kind === "command" ? null : keptNames(inOrder([...gone, ...snapshots], atSource), policy);
      const [last = -1] = arrived;
      const wanted = snapshots.filter((snapshot) =>
        keeps
          ? keeps.has(snapshot.name) && !arrived.has(serial(snapshot))
          : arrived.size === 0
            ? snapshot === taken
            : serial(snapshot) > last,
      );
      const names = transfers.map(({ snapshot }) => snapshot.name);
      must(
        names.join() === wanted.map((snapshot) => snapshot.name).join(),
        `${id} is sent exactly what it lacks of what it would keep`,
        () => [names, wanted.map((snapshot) => snapshot.name)],
      );
    }

    /** Exactly what the policy keeps, the newest, and the newest that the source has as well. */
    function checkDestination(
      { plan: { id, policy }, backups, history }: Place,
      stays: readonly Backup[],
      must: Must,
    ): void {
      const newest = backups.reduce((a, b) => (serial(a) > serial(b) ? a : b));
      const shared = backups
        .filter((backup) => atSource.has(serial(backup)))
        .reduce((a, b) => (serial(a) > serial(b) ? a : b));
      must(stays.includes(newest), `the newest backup at ${id} stays`);
      must(stays.includes(shared), `the newest backup at ${id} that the source shares stays`);
      if (!compared(backups)) return;
      const left = new Set(stays.map((backup) => backup.name));
      const keeps = keptNames(inOrder(backups, atSource), policy).add(newest.name).add(shared.name);
      must(
        same(left, keeps) || leapt(backups, left, keeps),
        `${id} keeps exactly what its policy keeps`,
        () => [[...left], [...keeps]],
      );
      if (plan.compareHistory && run % 1999 === 0) {
        // As if everything that ever arrived were still there.
        const ever = keptNames(history, policy).add(newest.name).add(shared.name);
        must(
          same(left, ever) || leapt(backups, left, ever),
          `${id} keeps exactly what its policy would keep of all it ever got`,
          () => [[...left], [...ever]],
        );
        tally.histories++;
      }
    }

    /** The newest; what any known destination shares; and beyond that exactly what the policy keeps. */
    function checkSource(
      stays: readonly Snapshot[],
      claimants: readonly Claimant[],
      must: Must,
    ): void {
      must(stays.includes(taken), "the newest snapshot stays");
      const exact = compared(snapshots);
      const names = exact ? snapshots.map((snapshot) => snapshot.name) : [];
      const keeps = keptNames(names, plan.source).add(taken.name);
      for (const {
        plan: { id, policy },
        arrived,
      } of places) {
        const shared = snapshots.findLast((snapshot) => arrived.has(serial(snapshot)));
        must(arrived.size === 0 || shared !== undefined, `something is shared with ${id}`);
        must(
          shared === undefined || stays.includes(shared),
          `the newest snapshot that ${id} shares stays`,
          () => shared?.name,
        );
        if (shared) keeps.add(shared.name);
        const claimant = claimants.find((claimant) => claimant.id === id);
        if (claimant?.unread && arrived.size === 0) {
          must(stays.length === snapshots.length, `nothing goes while nothing is known of ${id}`);
          tally.freezes++;
          for (const snapshot of snapshots) keeps.add(snapshot.name);
        }
        if (plan.keepUnsent && exact && id !== notGiven?.plan.id && !served.get(id)?.done) {
          const wanted = keptNames(names, policy);
          for (const snapshot of snapshots)
            if (
              wanted.has(snapshot.name) &&
              (shared === undefined || serial(snapshot) > serial(shared))
            )
              keeps.add(snapshot.name);
        }
      }
      const left = new Set(stays.map((snapshot) => snapshot.name));
      if (exact)
        must(
          same(left, keeps) || leapt(snapshots, left, keeps),
          "the source keeps exactly what its policy and its destinations need",
          () => [[...left], [...keeps]],
        );
    }
  }
  return tally;
}

type Must = (fine: boolean, promise: string, detail?: () => unknown) => void;

const YEAR = 8760;

function promise(title: string, plan: Plan): void {
  test(
    title,
    () => {
      const tally = simulate(plan, generator(SEED));
      console.log(`${title}: ${JSON.stringify(tally)}`);
      expect(tally.runs).toBe(plan.runs);
      // One full transfer for each destination, in all the time.
      expect(tally.full).toBe(plan.destinations.length);
      if (plan.destinations.some(({ since }) => since !== undefined))
        expect(tally.freezes).toBeGreaterThan(0);
      // The simulation really met what it is about.
      const autumns = Math.floor(plan.runs / YEAR);
      expect(tally.repeatedHours).toBeGreaterThanOrEqual(autumns);
      expect(tally.skippedHours).toBeGreaterThanOrEqual(autumns);
      expect(tally.leaps).toBeLessThan(plan.runs); // of one look at each place and run
      for (const met of ["absences", "failures", "deletions"] as const)
        expect(tally[met]).toBeGreaterThan(0);
    },
    300_000,
  );
}

promise("ten years, calendar words, counts and windows", {
  runs: TEN_YEARS,
  source: "12h 7d 4w",
  keepUnsent: false,
  late: 0,
  compareHistory: true,
  destinations: [
    { id: "calendar", policy: "24h 7d 4w 12m 10y", goesAway: 0.002, fails: 0.03, longest: YEAR },
    { id: "count", policy: "30", goesAway: 0.01, fails: 0.05, longest: YEAR / 4 },
    { id: "window", policy: "36h+ 2w 12m", goesAway: 0.004, fails: 0.02, longest: YEAR / 2 },
  ],
});

promise("five years, a source that keeps one, disks that are mostly away, and a command", {
  runs: 5 * YEAR,
  source: "1",
  keepUnsent: false,
  late: 1200,
  compareHistory: false,
  destinations: [
    { id: "everything", policy: "0", since: 300, goesAway: 0.9, fails: 0.2, longest: YEAR },
    { id: "weeks", policy: "1 *w", goesAway: 0.005, fails: 0.1, longest: YEAR },
    {
      id: "command",
      policy: "0",
      kind: "command",
      since: 50,
      goesAway: 0.01,
      fails: 0.1,
      longest: YEAR / 12,
    },
  ],
});

promise("two years, what could not be sent is kept for later", {
  runs: 2 * YEAR,
  source: "3 12h+",
  keepUnsent: true,
  late: 1200,
  compareHistory: false,
  destinations: [
    { id: "calendar", policy: "24h 14d *m", goesAway: 0.02, fails: 0.1, longest: YEAR / 2 },
    { id: "window", policy: "3d+", since: 100, goesAway: 0.02, fails: 0.1, longest: YEAR / 4 },
    { id: "one", policy: "1", goesAway: 0.02, fails: 0.1, longest: YEAR / 4 },
  ],
});

promise("a winter until after the clocks change, and a source that keeps everything", {
  runs: 93 * 24,
  source: "0",
  keepUnsent: false,
  late: 1200,
  compareHistory: false,
  destinations: [
    { id: "everything", policy: "0", goesAway: 0.01, fails: 0.1, longest: 500 },
    { id: "days", policy: "*d", goesAway: 0.01, fails: 0.1, longest: 500 },
    { id: "one", policy: "1", goesAway: 0.01, fails: 0.1, longest: 500 },
  ],
});
