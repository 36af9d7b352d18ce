// What holds for any input: names, listings, records, policies, planning, argument files, commands over ssh.

import { expect, test } from "bun:test";
import fc from "fast-check";
import {
  arrange,
  commandFor,
  expandFiles,
  isComplete,
  parseCommand,
  parseInspection,
  parseLocation,
  parseName,
  parsePolicy,
  parseRecord,
  parseStreams,
  parseSubvolumes,
  planDestination,
  planFreeing,
  planImport,
  planRoom,
  planSource,
  planTransfers,
  planVisits,
  retain,
  snapshotsAmong,
  stamp,
  streamName,
  UsageError,
  VERBS,
  wallClock,
  type ChainRecord,
  type Claimant,
  type Entry,
  type Foreign,
  type Snapshot,
  type Standing,
  type Subvolume,
} from "../btrfs-backup.ts";
import { named } from "./support/names.ts";

const numRuns = Number(process.env["SOAK"] ?? 300);
const holds = <T extends [unknown, ...unknown[]]>(...property: Parameters<typeof fc.property<T>>) =>
  fc.assert(fc.property(...property), {
    numRuns,
    ...(process.env["SEED"] === undefined ? {} : { seed: Number(process.env["SEED"]) }),
  });

const text = fc
  .oneof(
    fc.string({ unit: "binary", maxLength: 40 }),
    fc.string({
      unit: fc.constantFrom(..."'\"\\!$`;|&<>(){}[]*?~#= \t\n,:@/-+.0123456789abü☃"),
      maxLength: 40,
    }),
  )
  .filter((word) => !word.includes("\0"));
const line = text.filter((word) => !/[\n\r]/.test(word));
const prefix = line.filter((word) => !word.includes("/") && Buffer.byteLength(word) <= 70);
const moment = fc.date({
  min: new Date("1971-01-01"),
  max: new Date("2199-12-30"),
  noInvalidDate: true,
});
const uuid = fc.nat(99).map((n) => `${String(n).padStart(8, "0")}-aaaa-bbbb-cccc-0123456789ab`);

test("a name is a prefix and a real date, and nothing else is", () => {
  holds(prefix, moment, text, (before, date, more) => {
    const name = before + stamp(date);
    expect(parseName(name, before)).toBe(wallClock(date));
    if (more !== "")
      for (const other of [name + more, more + name])
        expect(parseName(other, before)).toBe(
          other === name
            ? wallClock(date)
            : other.startsWith(before) && /^\d{8}-\d{6}$/.test(other.slice(before.length))
              ? parseName(other, before)
              : null,
        );
  });
  holds(
    fc.tuple(fc.nat(9999), fc.nat(99), fc.nat(99), fc.nat(99), fc.nat(99), fc.nat(99)),
    ([year, month, day, hour, minute, second]) => {
      const two = (n: number) => String(n).padStart(2, "0");
      const date = `${String(year).padStart(4, "0")}-${two(month)}-${two(day)}`;
      const real =
        month >= 1 &&
        month <= 12 &&
        day >= 1 &&
        day <= new Date(Date.UTC(2000 + (year % 400), month, 0)).getUTCDate() &&
        hour < 24 &&
        minute < 60 &&
        second < 60;
      expect(
        parseName(`${date.replaceAll("-", "")}-${two(hour)}${two(minute)}${two(second)}`, "") !==
          null,
      ).toBe(real);
    },
  );
});

test("a listing of any paths is read as it was written, or is an error", () => {
  const subvolume = fc.record({
    path: fc.oneof(text, fc.constant("20260101-000000")).filter((path) => path !== ""),
    parent: fc.option(uuid),
    received: fc.option(uuid),
    readonly: fc.boolean(),
  });
  holds(fc.array(subvolume, { maxLength: 12 }), (listed) => {
    const own = (i: number) => `00000000-0000-0000-0000-${String(i).padStart(12, "0")}`;
    const unique = listed.map((one, i) => ({
      ...one,
      path: `${i}/${one.path.replaceAll("\n", "")}`,
    }));
    const all = unique
      .map(
        ({ path, parent, received }, i) =>
          `ID ${256 + i} gen 7 cgen 7 top level 5 parent_uuid ${(parent ?? "-").padEnd(36)} received_uuid ${(received ?? "-").padEnd(36)} uuid ${own(i)} path ${path}`,
      )
      .join("\n");
    const readonly = unique
      .flatMap(({ path, readonly }, i) =>
        readonly ? [`ID ${256 + i} gen 7 top level 5 path ${path}`] : [],
      )
      .join("\n");
    expect(parseSubvolumes(all, readonly)).toEqual(
      unique.map(({ path, parent, received, readonly }, i) => ({
        id: 256 + i,
        path,
        uuid: own(i),
        parentUuid: parent,
        receivedUuid: received,
        readonly,
        cgen: 7,
      })),
    );
  });
  // Nothing that a forged name adds makes one of ours: it is an error, or a line of a path.
  holds(text, (name) => {
    const forged = `ID 256 gen 7 cgen 7 top level 5 parent_uuid -                                    received_uuid -                                    uuid 00000000-0000-0000-0000-000000000001 path x\n${name}`;
    try {
      expect(parseSubvolumes(forged, "")[0]?.path.startsWith("x")).toBe(true);
    } catch (error) {
      expect((error as Error).message).toContain("btrfs subvolume list");
    }
  });
  holds(
    text,
    (output) => void expect(() => parseInspection(`\nnonce ${output}`, "nonce", "/x")).toThrow(),
  );
});

test("a record is read as it was written, and any other text is unreadable, not half read", () => {
  const destination = fc.record({
    location: text,
    filesystem: fc.option(uuid),
    pin: fc.option(fc.record({ name: text, uuid })),
    last: fc.option(text),
  });
  const chain = fc.record(
    {
      owner: fc.record({ uuid, host: text, path: text }),
      receiving: text,
      strangers: fc.array(uuid),
      destinations: fc.array(destination),
    },
    { requiredKeys: [] },
  );
  holds(
    fc.dictionary(prefix, chain as fc.Arbitrary<ChainRecord>),
    text,
    fc.nat(),
    (chains, junk, at) => {
      const written = [
        '{"/": 1',
        ...Object.entries(chains).map(
          ([one, record]) => `,${JSON.stringify(one)}: ${JSON.stringify(record)}`,
        ),
        "}",
      ].join("\n");
      const read = parseRecord(written);
      expect([read.unreadable, Object.fromEntries(read.chains)]).toEqual([
        null,
        JSON.parse(JSON.stringify(chains)),
      ]);
      const damaged =
        written.slice(0, at % written.length) + junk + written.slice((at % written.length) + 1);
      const { chains: some, unreadable } = parseRecord(damaged);
      if (unreadable !== null) expect(some.size).toBe(0);
      else
        for (const [one, record] of some)
          expect(damaged).toContain(`,${JSON.stringify(one)}: ${JSON.stringify(record)}`);
    },
  );
});

test("a stream's name says everything again", () => {
  holds(
    prefix,
    moment,
    uuid,
    uuid,
    fc.option(uuid),
    fc.constantFrom("", "3"),
    fc.boolean(),
    fc.integer({ min: -14 * 60, max: 14 * 60 }),
    (before, date, own, source, parent, level, encrypted, offset) => {
      const time = wallClock(date);
      const snapshot: Snapshot = {
        id: 1,
        name: named(before + stamp(date)),
        path: "",
        uuid: own,
        receivedUuid: null,
        parentUuid: null,
        readonly: true,
        time,
        moment: time - offset * 60e3,
      };
      const owner = { uuid: source, place: "01234567", lineage: "89abcdef" };
      const name = streamName(
        { snapshot, parent: parent === null ? null : { ...snapshot, uuid: parent } },
        owner,
        { level, recipients: encrypted ? ["me"] : [] },
      );
      const [stream] = parseStreams([{ name, bytes: 5 }], true).streams;
      expect(stream).toMatchObject({
        name: snapshot.name,
        moment: snapshot.moment,
        receivedUuid: own,
        from: parent,
        owner,
        compressed: level !== "",
        encrypted,
        bytes: 5,
      });
    },
  );
});

const unit = fc.constantFrom("", "h", "d", "w", "m", "y", "h+", "d+", "w+", "m+", "y+");
const policy = fc
  .uniqueArray(fc.tuple(fc.integer({ min: 1, max: 50 }), unit), {
    minLength: 1,
    maxLength: 5,
    selector: ([, unit]) => unit,
  })
  .map((words) => words.map(([count, unit]) => `${count}${unit}`).join(" "));

test("a policy is a list of known words, each once; all else is a usage error", () => {
  holds(policy, fc.constantFrom(" ", "  ", "\t"), (words, blank) => {
    const read = parsePolicy(words.replaceAll(" ", blank));
    expect(
      [
        read?.newest === 0 ? [] : [`${read?.newest}`],
        read?.firstOf.map(({ unit, count }) => `${count}${unit}`),
        read?.within.map(({ unit, count }) => `${count}${unit}+`),
      ]
        .flat()
        .sort(),
    ).toEqual(words.split(" ").sort());
    expect(() => parsePolicy(`${words} ${words.split(" ")[0]}`)).toThrow(UsageError);
  });
  holds(text, (word) => {
    try {
      parsePolicy(word);
      expect(
        word
          .trim()
          .replace(/^\+(?=\d+$)/, "")
          .split(/\s+/)
          .every((one) => /^(\d+|\*[hdwmy]\+?|\d+[hdwmy]\+?)$/.test(one)),
      ).toBe(true);
    } catch (error) {
      expect(error).toBeInstanceOf(UsageError);
    }
  });
});

/** Snapshots of a source in the order of their IDs, whatever their names say. */
const snapshots = fc
  .uniqueArray(moment, { minLength: 1, maxLength: 25, selector: stamp })
  .map((dates) =>
    dates.map((date, i): Snapshot => ({
      id: 300 + i,
      name: named(stamp(date)),
      path: stamp(date),
      uuid: `s${i}`,
      receivedUuid: null,
      parentUuid: "home",
      readonly: true,
      time: wallClock(date),
      moment: date.getTime(),
    })),
  );
const backupOf = (snapshot: Snapshot): Snapshot => ({
  ...snapshot,
  id: snapshot.id + 1000,
  uuid: `b${snapshot.uuid}`,
  receivedUuid: snapshot.uuid,
  parentUuid: null,
});
const standing = (backups: Snapshot[]): Standing => ({
  held: backups,
  backups,
  copied: new Map(),
  obstacles: new Map(),
  chained: null,
});

test("retention keeps the newest, what it kept before, and what a stricter policy keeps", () => {
  holds(snapshots, policy, moment, (all, words, date) => {
    const rules = parsePolicy(words);
    const now = wallClock(date);
    const kept = (entries: readonly Snapshot[]) =>
      retain(entries, rules, now)
        .filter(({ reasons }) => reasons.length > 0)
        .map(({ entry }) => entry);
    const ordered = arrange(all, () => undefined);
    const once = kept(ordered);
    expect(once).toContain(ordered.at(-1) as Snapshot);
    // What is kept is kept again when the rest is gone: pruning twice is pruning once.
    expect(kept(once)).toEqual(once);
    expect(once.length).toBeGreaterThanOrEqual(Math.min(ordered.length, rules?.newest ?? 0));
  });
});

test("nothing takes the newest, a pin, a parent, or what is not ours, whatever is asked", () => {
  holds(
    snapshots,
    fc.array(fc.nat(24), { maxLength: 25 }),
    policy,
    policy,
    moment,
    fc.option(fc.nat(24)),
    (all, held, here, there, date, pinned) => {
      const now = wallClock(date);
      const backups = all.filter((_, i) => held.includes(i)).map(backupOf);
      const state = standing(backups);
      const pin = pinned === null ? null : (all[pinned] ?? null);
      const claimants: Claimant[] = [
        { id: "x", pin, unread: false, unsentPolicy: null },
        { id: "y", pin: null, unread: false, unsentPolicy: null },
      ];
      const going = planSource(all, claimants, { policy: parsePolicy(here), now })
        .filter(({ reasons }) => reasons.length === 0)
        .map(({ entry }) => entry);
      expect(going).not.toContain(all.at(-1) as Snapshot);
      if (pin !== null) expect(going).not.toContain(pin);
      expect(
        planSource(all, [{ ...(claimants[1] as Claimant), unread: true }], {
          policy: parsePolicy(here),
          now,
        }).every(({ reasons }) => reasons.length > 0),
      ).toBe(true);
      // Transfers: each snapshot once, the newest always, each on something that is there by then, oldest first.
      const { transfers } = planTransfers(all, state, {
        policy: parsePolicy(there),
        incremental: true,
        newestOnly: false,
        now,
        fullEvery: null,
      });
      const known = new Set(backups.map(({ receivedUuid }) => receivedUuid as string));
      for (const { snapshot, parent, belated } of transfers) {
        expect(known.has(snapshot.uuid)).toBe(false);
        const earlier = all.slice(0, all.indexOf(snapshot)).filter(({ uuid }) => known.has(uuid));
        const [later = null] = all
          .slice(all.indexOf(snapshot))
          .filter(({ uuid }) => known.has(uuid));
        expect(parent).toBe(earlier.at(-1) ?? later);
        expect(belated === true).toBe(
          all.slice(all.indexOf(snapshot)).some(({ uuid }) => known.has(uuid)),
        );
        known.add(snapshot.uuid);
      }
      expect(known.has((all.at(-1) as Snapshot).uuid)).toBe(true);
      // Afterwards.
      const after = [...backups, ...transfers.map(({ snapshot }) => backupOf(snapshot))];
      const dropped = planDestination(all, standing(after), { policy: parsePolicy(there), now })
        .filter(({ reasons }) => reasons.length === 0)
        .map(({ entry }) => entry);
      const newest = after.find(
        ({ receivedUuid }) => receivedUuid === all.at(-1)?.uuid,
      ) as Snapshot;
      expect(dropped).not.toContain(newest);
      expect(dropped.every((one) => after.includes(one) && isComplete(one))).toBe(true);
      for (const one of planRoom(all, state, transfers, { policy: parsePolicy(there), now })) {
        expect(backups).toContain(one);
        expect(transfers.some(({ parent }) => parent?.uuid === one.receivedUuid)).toBe(false);
      }
    },
  );
});

test("what is kept, and what lasts, never goes for space, and no stream ever lacks what it builds on", () => {
  const numbers = fc.array(fc.nat(24), { maxLength: 6 });
  const least = fc.integer({ min: 1, max: 9 });
  holds(
    snapshots,
    policy,
    moment,
    least,
    fc.record({ kept: numbers, shared: numbers, full: fc.array(fc.nat(24), { maxLength: 25 }) }),
    fc.boolean(),
    (all, words, date, newest, { kept, shared, full }, stored) => {
      const rules = { policy: parsePolicy(words), now: wallClock(date) };
      const backups = all.map((one, i) => ({
        ...backupOf(one),
        parentUuid: stored && i > 0 && !full.includes(i) ? `bs${i - 1}` : null,
        ...(kept.includes(i) ? { kept: "" } : {}),
      }));
      const here = all.filter((_, i) => shared.includes(i));
      const state = { ...standing(backups), chained: stored ? [] : null };
      const order = planFreeing(here, state, rules, newest);
      expect(new Set(order).size).toBe(order.length);
      const goes = new Set<Snapshot>(order);
      const ordered = planDestination(here, state, rules).map(({ entry }) => entry);
      // The newest, a pin, what is kept; and what each word with m or y keeps by itself.
      const pin = all.findLast((_, i) => shared.includes(i));
      const lasting = words.split(" ").filter((word) => /[my]/.test(word));
      const stay = [
        ...ordered.slice(-newest),
        ...ordered.filter((one) => one.kept !== undefined),
        ...ordered.filter(({ receivedUuid }) => receivedUuid === pin?.uuid),
        ...lasting.flatMap((word) =>
          retain(ordered, parsePolicy(word), rules.now)
            .slice(0, -1)
            .flatMap(({ entry, reasons }) => (reasons.length > 0 ? [entry] : [])),
        ),
      ];
      expect(stay.filter((one) => goes.has(one))).toEqual([]);
      const left = new Map(backups.map((one) => [one.uuid, one]));
      for (const one of order) {
        left.delete(one.uuid);
        for (const { parentUuid } of left.values())
          expect(parentUuid === null || left.has(parentUuid)).toBe(true);
      }
      if (!stored) expect(ordered.filter((one) => goes.has(one))).toEqual(order);
    },
  );
});

test("what is ours by name is put in one order, with nothing lost", () => {
  holds(snapshots, (all) => {
    const foreign: Entry = {
      ...(all[0] as Snapshot),
      name: named("foreign"),
      uuid: "f",
      moment: null,
    };
    const mixed: Entry[] = [...all.map((one) => ({ ...one, moment: null })), foreign];
    expect(snapshotsAmong(mixed.toReversed(), "", "home").map(({ uuid }) => uuid)).toEqual(
      all.map(({ uuid }) => uuid),
    );
  });
});

test("an argument file gives back its arguments, however they are nested", () => {
  const word = line.filter((one) => one.trim() === one && one !== "" && !/^[-@#]/.test(one));
  const option = fc
    .tuple(fc.stringMatching(/^--[a-z]{1,9}$/), word)
    .map(([name, value]) => [name, value]);
  const argument = fc.oneof(
    word.map((one) => [one]),
    option,
    fc.stringMatching(/^-[a-zA-Z]$/).map((one) => [one]),
  );
  holds(
    fc.array(argument, { maxLength: 8 }),
    fc.array(argument, { maxLength: 8 }),
    fc.constantFrom("\n", "\r\n", "\n\n  ", "\n# comment\n\t"),
    (outer, inner, separator) => {
      const file = (all: string[][]) => all.map((words) => words.join(" ")).join(separator);
      const files: Record<string, string> = {
        "/etc/outer": `${file(outer)}${separator}@inner\n`,
        "/etc/inner": file(inner),
      };
      const read = (path: string) =>
        files[path] ??
        (() => {
          throw new Error(path);
        })();
      expect(expandFiles(["@/etc/outer", "last"], read)).toEqual([
        ...outer.flat(),
        ...inner.flat(),
        "last",
      ]);
      expect(() => expandFiles(["@/etc/outer"], (path) => `${read(path)}\n@/etc/outer`)).toThrow(
        UsageError,
      );
    },
  );
});

test("a command over ssh is read by the guard as it was meant, for every verb", () => {
  holds(
    fc.constantFrom(...VERBS),
    fc.array(line, { maxLength: 8 }),
    fc.boolean(),
    (verb, args, sudo) => {
      expect(
        parseCommand(commandFor({ label: "", ssh: null, sudo, beat: 15 }, verb, args)),
      ).toEqual({ name: verb.name, sudo, args });
    },
  );
});

test("a location is one kind of place, whose name leads to it again", () => {
  holds(
    fc.oneof(
      line,
      line.map((path) => `ssh://host/${path}`),
      line.map((path) => `raw+ssh://me@host:22/${path}`),
      line.map((path) => `raw:///${path}`),
    ),
    (place) => {
      try {
        const location = parseLocation(place);
        expect(parseLocation(location.id)).toEqual(location);
        if (location.kind === "folder" || location.kind === "raw")
          expect(location.path.startsWith("/") && !location.path.split("/").includes("..")).toBe(
            true,
          );
      } catch (error) {
        expect(error).toBeInstanceOf(UsageError);
      }
    },
  );
});

test("what others took comes over once, in the order of its making, whatever is deleted on both sides", () => {
  type Step = readonly ["take" | "others" | "delete" | "prune" | "run", number];
  const steps = fc.array(
    fc.tuple(
      fc.constantFrom(
        "take" as const,
        "others" as const,
        "delete" as const,
        "prune" as const,
        "run" as const,
      ),
      fc.nat(99),
    ),
    { maxLength: 60 },
  );
  const midnight = Date.UTC(2026, 0, 1);
  holds(steps, (all: readonly Step[]) => {
    let id = 10;
    let clock = midnight;
    const [found, chain]: [Foreign[], Snapshot[]] = [[], []];
    const gone = new Map<string, Subvolume>();
    const done: number[] = [];
    const made = (uuid: string, parentUuid: string) => {
      clock += 1000;
      const common = { id, cgen: id, uuid, parentUuid, receivedUuid: null, readonly: true };
      return { ...common, path: "x", moment: clock };
    };
    const run = () => {
      const known = new Map([...gone.values(), ...found].map((one) => [one.uuid, one]));
      const { coming } = planImport(found, chain, { uuid: "source", all: known });
      for (const one of coming) {
        done.push(one.id);
        id++;
        const name = named(stamp(new Date(one.moment)));
        chain.push({ ...made(`c${id}`, one.uuid), name, time: one.moment, moment: one.moment });
      }
      const newest = chain.at(-1);
      const missed = found.filter(
        (one) =>
          one.parentUuid === "source" && (newest === undefined || one.moment > newest.moment),
      );
      expect(missed.every((one) => done.includes(one.id))).toBe(true);
    };
    for (const [step, n] of all) {
      id++;
      if (step === "take") found.push({ ...made(`f${id}`, "source"), below: "x", words: null });
      else if (step === "others")
        found.push({ ...made(`f${id}`, "other"), below: "x", words: null });
      else if (step === "delete" && found.length > 0) {
        const [out] = found.splice(n % found.length, 1);
        // The record tells of what the copies came from.
        if (out !== undefined) gone.set(out.uuid, out);
      } else if (step === "prune" && chain.length > 1) chain.splice(n % (chain.length - 1), 1);
      else if (step === "run") run();
    }
    expect(done).toEqual([...new Set(done)].sort((a, b) => a - b));
    expect(chain.map((one) => one.id)).toEqual(chain.map((one) => one.id).sort((a, b) => a - b));
  });
});

test("on the way through any store, each stream is received when what it builds on is there, and all that is wanted is seen once", () => {
  const name = (n: number) => `202601${String(n + 1).padStart(2, "0")}-000000`;
  const uuidOf = (n: number) => `${String(n).padStart(8, "0")}-aaaa-bbbb-cccc-0123456789ab`;
  // Each builds on an earlier one or on nothing; some are stored twice, in full.
  const stored = fc.array(
    fc.record({ on: fc.nat(20), isTwice: fc.boolean(), isWanted: fc.boolean() }),
    {
      minLength: 1,
      maxLength: 20,
    },
  );
  holds(stored, (all) => {
    const object = (n: number, from: string) =>
      `${name(n)}+0000_01234567_89abcdef_${uuidOf(99)}_${uuidOf(n)}_${from}.btrfs`;
    const files = all.flatMap(({ on, isTwice }, n) => [
      object(n, on < n ? uuidOf(on) : "full"),
      ...(isTwice && on < n ? [object(n, "full")] : []),
    ]);
    const { streams } = parseStreams(
      files.map((one) => ({ name: one, bytes: 1 })),
      true,
    );
    const wanted = streams.filter(({ name: one }) => all[Number(one.slice(6, 8)) - 1]?.isWanted);
    const visits = planVisits(new Set(wanted.map(({ uuid: one }) => one)), streams);
    const there = new Set<string>();
    const seen: (string | null)[] = [];
    for (const { piece, isWanted, gone } of visits) {
      expect(piece.parentUuid === null || there.has(piece.parentUuid)).toBe(true);
      expect(there.has(piece.uuid)).toBe(false);
      there.add(piece.uuid);
      if (isWanted) seen.push(piece.receivedUuid);
      for (const one of gone) expect(there.delete(one.uuid)).toBe(true);
    }
    expect([...there]).toEqual([]);
    expect(seen.toSorted()).toEqual([...new Set(wanted.map((one) => one.receivedUuid))].toSorted());
    // Along one chain, two are there at a time.
    if (streams.every((one) => one.parentUuid === null))
      for (const { gone } of visits) expect(gone).toHaveLength(1);
  });
});
