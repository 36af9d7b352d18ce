// Tables for the pure functions: what a name means, what a policy keeps, what is sent, what goes.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import {
  align,
  arrange,
  momentBefore,
  chainOf,
  changedSince,
  judgeClaim,
  conflictMessage,
  dataFinder,
  deletionOrder,
  parseEstimate,
  expandFiles,
  inventory,
  isComplete,
  isSnapshotFolder,
  leapNames,
  type Subvolume,
  narrowedForeign,
  parseForeign,
  judge,
  isOnlyFrame,
  beyondFolder,
  planImport,
  type Foreign,
  foreignMoment,
  leapsAmong,
  leaptTo,
  guardedRecord,
  leftoversOf,
  lineagesOf,
  memberHaving,
  memberLines,
  membersBelow,
  membersOf,
  momentOf,
  isUnfinished,
  mountAdvice,
  planRemount,
  replacedBy,
  newestShared,
  ownerOf,
  parseDuration,
  parseFullEvery,
  parseName,
  parsePolicy,
  parseStreams,
  parseLocation,
  parseSums,
  parseTimers,
  parseTools,
  partSize,
  planDestination,
  planPieces,
  asRead,
  choicesIn,
  choicesText,
  parseMinFree,
  parseMounts,
  parseNote,
  parseSurvey,
  proposalFor,
  proposalText,
  setupName,
  whyAway,
  asWritten,
  freeingState,
  freeOf,
  isEarlierState,
  withoutGone,
  lasting,
  lossIn,
  mendFor,
  parseRecord,
  parseRewritten,
  planRestore,
  sameDataAmong,
  fitsBeside,
  isNearlyFull,
  planFreeing,
  planRoom,
  planSource,
  ownFoldersIn,
  planStreams,
  planTransfers,
  planTree,
  prefixesIn,
  refusalMessage,
  related,
  type Rewritten,
  restoredDestinations,
  retain,
  shownNote,
  snapshotsAmong,
  stamp,
  standingIn,
  streamKey,
  streamName,
  unsentIn,
  UsageError,
  versionsAmong,
  wallClock,
  type Backup,
  type Claimant,
  type SetupFacts,
  timersTwice,
  type ChainRecord,
  type Decision,
  type Facts,
  type FileState,
  type Folder,
  type SourceIdentity,
  type KnownDestination,
  type Obstacle,
  type Snapshot,
  type Standing,
  type Stream,
  type Transfer,
  type TransferOptions,
  type StoredFile,
} from "../btrfs-backup.ts";
import { attribute, command, stream } from "./support/stream.ts";
import { named, numberedUuid } from "./support/names.ts";

// A day or a moment is written as in names, shortened: "0301" is 2024-03-01, 00:00:00.
const full = (short: string) => {
  const [day = "", time = ""] = short.split("-");
  return `${day.length === 4 ? `2024${day}` : day}-${time.padEnd(6, "0")}`;
};
const at = (short: string) => parseName(full(short), "") as number;
const FAR = at("20300101");

let lastId = 256;
/** A snapshot at the source: its UUID is "s" and its short name; the ID grows with every call. */
const snap = (short: string, fields: Partial<Snapshot> = {}): Snapshot => {
  const name = full(short);
  return {
    id: lastId++,
    name: named(name),
    time: at(short),
    moment: at(short),
    path: `snapshot/${name}`,
    uuid: `s${short}`,
    parentUuid: "source",
    receivedUuid: null,
    readonly: true,
    ...fields,
  };
};
/** What a destination has of it after a transfer. */
const backupOf = (snapshot: Snapshot, fields: Partial<Backup> = {}): Backup => ({
  ...snapshot,
  id: lastId++,
  path: `backup/${snapshot.name}`,
  uuid: `b${snapshot.uuid.slice(1)}`,
  parentUuid: null,
  receivedUuid: snapshot.receivedUuid ?? snapshot.uuid,
  ...fields,
});
const snaps = (shorts: string) =>
  shorts
    .split(" ")
    .filter(Boolean)
    .map((short) => snap(short));
const shortOf = (uuid: string) => uuid.slice(1);
const kept = <T extends Snapshot>(decisions: readonly Decision<T>[]) =>
  decisions
    .filter(({ reasons }) => reasons.length > 0)
    .map(({ entry }) => shortOf(entry.uuid))
    .join(" ");
const reasonsOf = (decisions: readonly Decision<Snapshot>[], short: string) =>
  decisions.find(({ entry }) => shortOf(entry.uuid) === short)?.reasons;
const standing = (backups: readonly Backup[], rest: Partial<Standing> = {}): Standing => ({
  held: backups,
  backups,
  copied: new Map(),
  obstacles: new Map(),
  chained: null,
  ...rest,
});

describe("names", () => {
  test.each<[string, string, boolean]>([
    ["20240229-235959", "", true],
    ["00010101-000000", "", true],
    ["99991231-235959", "", true],
    ["20230229-000000", "", false], // no leap year
    ["20240431-000000", "", false],
    ["20240100-000000", "", false],
    ["20240001-000000", "", false],
    ["20241301-000000", "", false],
    ["20240101-240000", "", false],
    ["20240101-006000", "", false],
    ["20240101-000060", "", false], // no leap second ever has a name
    ["20240101-00000", "", false],
    ["20240101-0000000", "", false],
    ["20240101 000000", "", false],
    ["20240101-000000\n", "", false],
    ["x20240101-000000", "", false],
    ["20240101-000000.new", "", false],
    ["٢٠٢٤0101-000000", "", false], // digits, but not those
    ["20240101-000000", "home-", false],
    ["home-20240101-000000", "home-", true],
    ["home-old-20240101-000000", "home-", false],
    ["home-old-20240101-000000", "home-old-", true],
    ["home-20240101-000000", "home-old-", false],
    ["homeX20240101-000000", "home.", false],
    ["home.20240101-000000", "home.", true],
    ["(a|b)*[c]$20240101-000000", "(a|b)*[c]$", true],
    ["2024010120240101-000000", "20240101", true], // a prefix of digits
    ["2024010120240101-000000", "", false],
    ["Home-20240101-000000", "home-", false],
  ])("%j with the prefix %j: ours is %p", (name, prefix, ours) => {
    expect(parseName(name, prefix) !== null).toBe(ours);
  });

  test("the time in a name is the wall clock, counted as if it were UTC", () => {
    expect(parseName("p20240229-010203", "p")).toBe(Date.UTC(2024, 1, 29, 1, 2, 3));
    expect(parseName("00500101-000000", "")).toBeLessThan(
      parseName("19000101-000000", "") as number,
    );
  });

  test("a stamp is local time in fifteen characters, and is read back as the wall clock", () => {
    expect(stamp(new Date(2024, 1, 3, 4, 5, 6))).toBe("20240203-040506");
    expect(wallClock(new Date(2024, 1, 3, 4, 5, 6))).toBe(Date.UTC(2024, 1, 3, 4, 5, 6));
    fc.assert(
      fc.property(
        fc.date({ min: new Date("0002-01-01"), max: new Date("9999-12-30"), noInvalidDate: true }),
        (date) => expect(parseName(stamp(date), "")).not.toBeNull(),
      ),
    );
  });
});

describe("same data", () => {
  const held = { ...snap("0101"), uuid: "H", receivedUuid: "R", parentUuid: "P" };
  const orphan = { ...snap("0102"), uuid: "O", receivedUuid: null };
  const find = dataFinder([orphan, held]);
  test.each<[string, Partial<Snapshot>, string | undefined]>([
    ["received from the snapshot", { uuid: "R", receivedUuid: null }, "H"],
    [
      "received from the snapshot, itself restored from elsewhere",
      { uuid: "R", receivedUuid: "elsewhere" },
      "H",
    ],
    ["both received from the same third", { uuid: "S", receivedUuid: "R" }, "H"],
    ["the snapshot was received from it (a restore)", { uuid: "S", receivedUuid: "H" }, "H"],
    [
      "the snapshot was received from one that was not received itself",
      { uuid: "S", receivedUuid: "O" },
      "O",
    ],
    ["nothing in common", { uuid: "S", receivedUuid: null }, undefined],
    [
      "neither was received: no UUID is not the same UUID",
      { uuid: "S", receivedUuid: null, name: orphan.name },
      undefined,
    ],
    ["the same parent is not the same data", { uuid: "S", parentUuid: "P" }, undefined],
    ["its parent is not the snapshot", { uuid: "P" }, undefined],
    [
      "the same name is not the same data",
      { uuid: "S", name: held.name, time: held.time },
      undefined,
    ],
  ])("%s", (_, fields, found) => {
    expect(find({ ...snap("0101"), ...fields })?.uuid).toBe(found);
  });

  test("complete is read-only and received", () => {
    const table = [true, false].flatMap((readonly) =>
      ["R", null].map((receivedUuid) => isComplete({ ...held, readonly, receivedUuid })),
    );
    expect(table).toEqual([true, false, false, false]);
  });

  test("the newest shared snapshot is the last in the source's order, not by name", () => {
    const [a, b, c] = [snap("1027-0230"), snap("1027-0200"), snap("1027-0300")] as const; // clocks went back after a
    expect(newestShared([a, b, c], [backupOf(b), backupOf(a)])).toBe(b);
    expect(newestShared([a, b, c], [])).toBeNull();
  });
});

describe("what stands at a destination", () => {
  const name = full("0301");
  const found = (
    fields: Partial<Backup> | null,
    announced: string[] = [],
    strangers: string[] = [],
  ) => {
    const entry = fields && backupOf(snap("0301"), fields);
    const list = entry ? [entry] : [];
    return standingIn(
      {
        standing: list,
        snapshots: list,
        entries: new Set([".", "..", "photos", name]),
        prefix: "",
      },
      { strangers },
      announced,
    );
  };
  test.each<[string, Standing, RegExp | "leftover", backups: number, held?: number]>([
    ["a plain directory or file", found(null), /not a subvolume/, 0],
    ["a complete backup", found({}), /other data/, 1],
    ["a complete backup of another source", found({}, [], ["b0301"]), /other data/, 0, 1],
    [
      "half a transfer that was announced",
      found({ readonly: false, receivedUuid: null }, [name]),
      "leftover",
      0,
    ],
    [
      "something writable that nobody announced",
      found({ readonly: false, receivedUuid: null }),
      /no transfer/,
      0,
    ],
    [
      "half a transfer, killed between the two last steps of btrfs receive",
      found({ readonly: false }, [name]),
      "leftover",
      0,
    ],
    ["a backup that was made writable", found({ readonly: false }), /made writable/, 0],
    [
      "a snapshot that was never received, even if it was announced",
      found({ receivedUuid: null }, [name]),
      /not received/,
      0,
    ],
  ])("%s", (_, { obstacles: taken, backups, held }, why, count, holding = count) => {
    expect([...taken.keys()]).toEqual([name]);
    const obstacle = taken.get(name) as Obstacle;
    expect(
      obstacle.kind === "leftover"
        ? obstacle.kind
        : conflictMessage({ snapshot: snap("0301"), obstacle }),
    ).toMatch(why);
    expect(backups).toHaveLength(count);
    expect(held).toHaveLength(holding);
  });
});

describe("policies", () => {
  test.each<[string, object]>([
    ["7", { newest: 7, firstOf: [], within: [] }],
    [" 7 ", { newest: 7, firstOf: [], within: [] }],
    [
      "24h 7d 4w 12m 10y",
      {
        newest: 0,
        firstOf: [
          ["h", 24],
          ["d", 7],
          ["w", 4],
          ["m", 12],
          ["y", 10],
        ],
        within: [],
      },
    ],
    ["*m", { newest: 0, firstOf: [["m", Infinity]], within: [] }],
    ["14d+", { newest: 0, firstOf: [], within: [["d", 14]] }],
    ["*y+", { newest: 0, firstOf: [], within: [["y", Infinity]] }],
    [
      "3 7d\t2w+  7d+",
      {
        newest: 3,
        firstOf: [["d", 7]],
        within: [
          ["w", 2],
          ["d", 7],
        ],
      },
    ],
  ])("%j is understood", (text, expected) => {
    const policy = parsePolicy(text);
    const pairs = (words: readonly { unit: string; count: number }[] = []) =>
      words.map(({ unit, count }) => [unit, count]);
    expect({
      newest: policy?.newest,
      firstOf: pairs(policy?.firstOf),
      within: pairs(policy?.within),
    }).toEqual(expected as never);
    expect(policy?.text).toBe(text);
  });

  test.each(["0", " 0 "])("%j keeps everything", (text) => expect(parsePolicy(text)).toBeNull());

  const wrong = [
    "",
    " ",
    "x",
    "-1",
    "1.5",
    "0d",
    "0h+",
    "0 7d",
    "7d 0",
    "00",
    "*",
    "*+",
    "7+",
    "d",
    "7D",
    "7days",
    "7 d",
    "7d,4w",
    "7d7d",
    "+7d",
    "7d++",
    "3 5",
    "7d 7d",
    "7d 14d",
    "2w+ 4w+",
    "99999999999999999999",
    "٧",
  ];
  test.each(wrong)("%j is a usage error", (text) =>
    expect(() => parsePolicy(text)).toThrow(UsageError),
  );

  test.each<[string, object]>([
    ["3d", { count: 3, unit: "d" }],
    ["12m", { count: 12, unit: "m" }],
    ["0h", { count: 0, unit: "h" }],
  ])("the duration %j is understood", (text, expected) =>
    expect(parseDuration(text)).toEqual(expected as never),
  );
  test.each(["", "3", "d", "3 d", "-3d", "3d+", "1.5d", "*d", "3x"])(
    "the duration %j is a usage error",
    (text) => expect(() => parseDuration(text)).toThrow(UsageError),
  );

  test("a window goes back by the calendar", () => {
    const back = (from: string, count: number, unit: "h" | "d" | "w" | "m" | "y") =>
      new Date(momentBefore(at(from), count, unit)).toISOString().slice(0, 16);
    expect(back("0301-12", 1, "h")).toBe("2024-03-01T11:00");
    expect(back("0301-12", 1, "d")).toBe("2024-02-29T12:00");
    expect(back("0301-12", 2, "w")).toBe("2024-02-16T12:00");
    expect(back("0301-12", 2, "m")).toBe("2024-01-01T12:00");
    expect(back("0301-12", 14, "m")).toBe("2023-01-01T12:00");
    expect(back("0301-12", 4, "y")).toBe("2020-03-01T12:00");
    expect(momentBefore(at("0301"), Infinity, "m")).toBe(-Infinity);
  });

  test.each(["m", "y"] as const)(
    "a window of %s never moves backwards as time goes on: nothing is dropped that is wanted again a day later",
    (unit) => {
      for (let day = at("20230101"); day < at("20250101"); day += 86400e3)
        for (const count of [1, 2, 6])
          expect(
            momentBefore(day + 86400e3, count, unit),
            new Date(day).toISOString(),
          ).toBeGreaterThanOrEqual(momentBefore(day, count, unit));
    },
  );

  test.each(["h", "d", "w", "m", "y"] as const)(
    "a window longer than time itself (%s) keeps everything",
    (unit) => {
      expect(kept(retain(snaps("0101 0102 0103"), parsePolicy(`9999999${unit}+`), FAR))).toBe(
        "0101 0102 0103",
      );
    },
  );
});

describe("retention", () => {
  test.each<[policy: string, entries: string, kept: string]>([
    ["0", "0101 0102 0103", "0101 0102 0103"],
    ["1", "0101 0102 0103", "0103"],
    ["2", "0101 0102 0103", "0102 0103"],
    ["9", "0101 0102 0103", "0101 0102 0103"],
    // the first of a period; the newest always
    ["*h", "0101-1000 0101-1030 0101-1059 0101-1100 0101-1101", "0101-1000 0101-1100 0101-1101"],
    ["*d", "0101-08 0101-23 0102-00 0102-01 0103-05", "0101-08 0102-00 0103-05"],
    ["*m", "0105 0131 0201 0229 0301 0331", "0105 0201 0301 0331"],
    ["*m", "20230301 20240301 20240302 20250301", "20230301 20240301 20250301"],
    [
      "*y",
      "20221231 20230101 20230601 20231231 20240101 20240102",
      "20221231 20230101 20240101 20240102",
    ],
    // the last N periods that have one, however far back they are
    ["2d", "20200101 20200102 0101 0101-12", "20200102 0101 0101-12"],
    ["2h", "0101-01 0301-01 0301-0130 0401-01", "0301-01 0401-01"],
    ["1y", "20230101 20240301 20240302", "20240301 20240302"],
    // ISO weeks: Monday to Sunday, across the new year
    [
      "*w",
      "20201227 20201228 20201231 20210101 20210103 20210104 20210105",
      "20201227 20201228 20210104 20210105",
    ],
    [
      "2w",
      "20201227 20201228 20201231 20210101 20210103 20210104 20210105",
      "20201228 20210104 20210105",
    ],
    ["*w", "20241229 20241230 20250101 20250105 20250106", "20241229 20241230 20250106"],
    ["*w", "19691231 19700101 19700104 19700105", "19691231 19700105"], // before and after the epoch
    // windows end at the newest, and include their beginning
    ["1d+", "0101-12 0102-1159 0102-12 0103-12", "0102-12 0103-12"],
    ["3h+", "0101-00 0101-01 0101-02 0101-04", "0101-01 0101-02 0101-04"],
    ["2w+", "0101 0117 0118 0131", "0117 0118 0131"],
    ["1m+", "0114 0115 0116 0215", "0115 0116 0215"],
    ["1y+", "20230228 20230301 20240301", "20230301 20240301"],
    ["*h+", "19990101 0101", "19990101 0101"],
    // what any word keeps is kept
    ["1 *m 2d+", "0101 0115 0201 0210 0211 0212", "0101 0201 0210 0211 0212"],
    ["*d", "", ""],
    ["1", "", ""],
    ["0", "", ""],
  ])("%s of [%s] keeps [%s]", (policy, entries, expected) => {
    expect(kept(retain(snaps(entries), parsePolicy(policy), FAR))).toBe(expected);
  });

  test("every reason is told, and the newest is always one", () => {
    const decisions = retain(snaps("0101 0102 0103"), parsePolicy("1 *m 1d+"), FAR);
    expect(decisions.map(({ reasons }) => reasons)).toEqual([
      ["first of its month (*m)"],
      ["within 1d"],
      ["newest", "one of the newest 1", "within 1d"],
    ]);
    expect(reasonsOf(retain(snaps("0101"), null, FAR), "0101")).toContain("newest");
  });

  test("a newest snapshot that is dated in the future does not empty the window", () => {
    expect(kept(retain(snaps("0101 0110 0111 20350101"), parsePolicy("2d+"), at("0112")))).toBe(
      "0110 0111 20350101",
    );
  });

  test("a run of days keeps one and the same snapshot of each for as long as it is kept", () => {
    const policy = parsePolicy("3d");
    let here: Snapshot[] = [];
    const first = new Map<string, string>();
    for (let hour = 0; hour < 24 * 10; hour += 5) {
      const time = at("0101") + hour * 3600e3;
      const name = new Date(time)
        .toISOString()
        .replace(/[-:]|\..*/g, "")
        .replace("T", "-");
      here = retain([...here, snap(name)], policy, FAR)
        .filter(({ reasons }) => reasons.length > 0)
        .map(({ entry }) => entry);
      const day = name.slice(0, 8);
      if (!first.has(day)) first.set(day, name);
      const days = [...first.values()].slice(-3);
      expect(here.map((entry) => entry.name)).toEqual(
        [...new Set([...days, name].map(named))].sort(),
      );
    }
  });
});

describe("order", () => {
  const rankBy = (order: string) => (entry: Snapshot) =>
    order.split(" ").indexOf(shortOf(entry.uuid)) + 1 || undefined;
  const arranged = (entries: string, order: string) =>
    arrange(snaps(entries), rankBy(order))
      .map(({ uuid }) => shortOf(uuid))
      .join(" ");
  test.each<[string, entries: string, ranks: string, expected: string]>([
    ["by name, when the source knows none", "0103 0101 0102", "", "0101 0102 0103"],
    [
      "by the source's order, when it knows all",
      "0103 0101 0102",
      "0102 0103 0101",
      "0102 0103 0101",
    ],
    [
      "names went back when summer time ended",
      "1027-0100 1027-0200 1027-0230 1027-0215 1027-0300",
      "1027-0100 1027-0200 1027-0230 1027-0215 1027-0300",
      "1027-0100 1027-0200 1027-0230 1027-0215 1027-0300",
    ],
    [
      "what is gone at the source stands by its name",
      "1027-0230 1027-0215 1026 1028",
      "1027-0230 1027-0215",
      "1026 1027-0230 1027-0215 1028",
    ],
    [
      "what is gone stands between, too",
      "0101 0102 0103 0104 0105",
      "0101 0105 0103",
      "0101 0102 0105 0104 0103",
    ],
    ["nothing", "", "", ""],
  ])("%s", (_, entries, ranks, expected) => expect(arranged(entries, ranks)).toBe(expected));
});

describe("transfers", () => {
  const options = { policy: null, incremental: true, newestOnly: false, now: FAR, fullEvery: null };
  const planned = (
    snapshots: readonly Snapshot[],
    place: Standing,
    more: Partial<TransferOptions> = {},
  ) => {
    const { transfers, conflicts } = planTransfers(snapshots, place, { ...options, ...more });
    const sent = transfers.map(
      ({ snapshot, parent }) =>
        `${shortOf(snapshot.uuid)}<${parent === null ? "" : shortOf(parent.uuid)}`,
    );
    return [...sent, ...conflicts.map(({ snapshot: { name } }) => `conflict ${name}`)].join(" ");
  };
  const s = snaps("0101 0102 0103 0104 0105");
  const backups = (...numbers: number[]) => numbers.map((n) => backupOf(s[n - 1] as Snapshot));
  const other: Obstacle = { kind: "other", backup: backupOf(snap("0102"), { receivedUuid: "x" }) };

  test.each<[string, number[], string, string]>([
    [
      "an empty destination gets all, the first in full",
      [],
      "0",
      "0101< 0102<0101 0103<0102 0104<0103 0105<0104",
    ],
    ["only what is missing", [1, 2, 3, 4], "0", "0105<0104"],
    ["nothing, when nothing is missing", [1, 2, 3, 4, 5], "0", ""],
    [
      "a gap is filled, each against the closest earlier one on both sides",
      [1, 3],
      "9",
      "0102<0101 0104<0103 0105<0104",
    ],
    [
      "no earlier one on both sides: against the nearest later one",
      [3, 4],
      "9",
      "0101<0103 0102<0101 0105<0104",
    ],
    [
      "without a policy, what is older than the newest there stays away",
      [1, 3],
      "0",
      "0104<0103 0105<0104",
    ],
    ["also where only the newest is there", [5], "0", ""],
    ["only what the policy would keep", [1], "2", "0104<0101 0105<0104"],
    ["nothing but the newest of an empty destination", [], "1", "0105<"],
    ["the backups that are there count", [1, 4], "2", "0105<0104"],
  ])("%s", (_, held, policy, expected) =>
    expect(planned(s, standing(backups(...held)), { policy: parsePolicy(policy) })).toBe(expected),
  );

  test("nothing is sent when there is nothing", () => expect(planned([], standing([]))).toBe(""));

  test("a backup whose snapshot is gone at the source still is the first of its period", () => {
    const gone = backupOf(snap("0301-00"));
    const here = snaps("0301-01 0301-02 0302-00 0302-01");
    expect(planned(here, standing([gone]), { policy: parsePolicy("*d") })).toBe(
      "0302-00< 0302-01<0302-00",
    );
  });

  test("the newest snapshot is sent even if a backup there is dated in the future", () => {
    const gone = backupOf(snap("20290101")); // made while the clock was wrong, deleted at the source since
    const here = snaps("0301-00 0301-01");
    const place = standing([gone, backupOf(here[0] as Snapshot)]);
    expect(planned(here, place, { policy: parsePolicy("1") })).toBe("0301-01<0301-00");
    expect(planned(here, place, { policy: parsePolicy("*d") })).toBe("0301-01<0301-00");
  });

  test("the parent is the closest by the source's order when clocks went back", () => {
    const here = snaps("1027-0200 1027-0230 1027-0215");
    expect(
      planned(here, standing([backupOf(here[0] as Snapshot), backupOf(here[1] as Snapshot)])),
    ).toBe("1027-0215<1027-0230");
  });

  test("--newest-only sends the newest, against the closest one there", () => {
    expect(planned(s, standing([]), { newestOnly: true })).toBe("0105<");
    expect(planned(s, standing(backups(2)), { newestOnly: true })).toBe("0105<0102");
    expect(planned(s, standing(backups(5)), { newestOnly: true })).toBe("");
  });

  test("--backfill sends it all the same, and so is what a run could not send", () => {
    expect(planned(s, standing(backups(5)), { backfill: true })).toBe(
      "0101<0105 0102<0101 0103<0102 0104<0103",
    );
    expect(planned(s, standing(backups(2, 5)), { failed: new Set([s[2]?.uuid as string]) })).toBe(
      "0103<0102",
    );
    const { skipped, transfers } = planTransfers(s, standing(backups(2, 5)), options);
    expect([skipped, transfers]).toEqual([3, []]);
    const [first] = planTransfers(s, standing(backups(5)), {
      ...options,
      backfill: true,
    }).transfers;
    expect(first?.belated).toBe(true);
  });

  test("--no-incremental sends the same, each in full", () => {
    expect(planned(s, standing(backups(1, 3)), { incremental: false })).toBe("0104< 0105<");
  });

  test("a complete backup by any name is held: not sent again, and good as a parent", () => {
    const renamed = backupOf(s[3] as Snapshot, { name: named("before the upgrade") });
    expect(planned(s, standing([], { held: [renamed] }), { policy: parsePolicy("2") })).toBe(
      "0105<0104",
    );
  });

  test("a leftover is in nobody's way, and no parent", () => {
    const place = standing(backups(1), {
      obstacles: new Map([[full("0102"), { kind: "leftover" }]]),
    });
    expect(planned(s.slice(0, 3), place)).toBe("0102<0101 0103<0102");
  });

  test("a name taken by something else is a conflict: left alone, no parent, and the others are sent", () => {
    const place = standing(backups(1), {
      obstacles: new Map([[full("0102"), other]]),
    });
    expect(planned(s.slice(0, 3), place)).toBe(`0103<0101 conflict ${full("0102")}`);
  });

  test("a conflict tells what both sides hold", () => {
    expect(conflictMessage({ snapshot: s[1] as Snapshot, obstacle: other })).toBe(
      `${full("0102")} is not sent: a backup of other data has that name (UUID there: x, here: s0102); rename or remove it`,
    );
  });

  test("destinations share a stream that is made alike for both, of the same snapshot and parent", () => {
    const made = { level: "3", protocol: "2", rate: 1000 };
    const transfer: Transfer = { snapshot: s[1] as Snapshot, parent: s[0] as Snapshot };
    const key = (form: object | null, id = "/a", more: Partial<Transfer> = {}) =>
      streamKey({ ...transfer, ...more }, { id, form: () => form as typeof made }, {} as Folder);
    for (const [one, other, isShared] of [
      [key(made, "/a"), key({ ...made, chosen: true }, "/b"), true],
      [key(made), key({ ...made, level: "" }), false],
      [key(made), key({ ...made, protocol: null }), false],
      [key(made), key({ ...made, rate: null }), false],
      [key(made), key(made, "/a", { parent: null }), false],
      [key(made), key(made, "/a", { snapshot: s[2] as Snapshot }), false],
      [key(null, "/a"), key(null, "/b"), false],
      [key(null, "/a"), key(made, "/a"), false],
    ] as const)
      expect(one === other).toBe(isShared);
  });

  test("a taken name that is not wanted, or holds the data itself, is no conflict", () => {
    const taken = new Map(s.map(({ name }) => [name, other]));
    expect(
      planned(s, standing(backups(5), { obstacles: taken }), { policy: parsePolicy("1") }),
    ).toBe("");
  });

  test("a restored snapshot is not sent back to where it came from", () => {
    const backup = backupOf(snap("0101"));
    const restored = snap("0101", { uuid: "s-restored", receivedUuid: "b0101" });
    expect(planned([restored, snap("0102")], standing([backup]))).toBe("0102<-restored");
  });

  test.each<[string, string | null, object, string]>([
    ["nothing remembered: only the newest, in full", null, {}, "0105<"],
    ["what came after the last one", "0103", {}, "0104<0103 0105<0104"],
    ["nothing new", "0105", {}, ""],
    ["the last one is gone: in full what is later by name", "0103-12", {}, "0104< 0105<0104"],
    ["in full with -I", "0103", { incremental: false }, "0104< 0105<"],
    ["only the newest", "0102", { newestOnly: true }, "0105<0102"],
    ["only the newest, and it is there", "0105", { newestOnly: true }, ""],
  ])("to a command: %s", (_, last, more, expected) => {
    const memory = last === null ? null : { name: full(last), uuid: `s${last}` };
    const transfers = planStreams(s, memory, {
      incremental: true,
      newestOnly: false,
      prefix: "",
      ...more,
    });
    expect(
      transfers
        .map(
          ({ snapshot, parent }) =>
            `${shortOf(snapshot.uuid)}<${parent === null ? "" : shortOf(parent.uuid)}`,
        )
        .join(" "),
    ).toBe(expected);
  });

  test("to a command: the last stream is known by its UUID, whatever stands under its name now", () => {
    const transfers = planStreams(
      s,
      { name: full("0105"), uuid: "s0102" },
      { incremental: true, newestOnly: false, prefix: "" },
    );
    expect(transfers.map(({ snapshot }) => snapshot.uuid)).toEqual(["s0103", "s0104", "s0105"]);
  });
});

describe("strangers in a record", () => {
  const there = snaps("0101 0102 0103 0104").map((one, i) => ({ ...one, id: 300 + i }));
  const others = Array.from({ length: 600 }, (_, i) => ({
    ...snap("0105", { uuid: `o${i}` }),
    id: 400 + i,
  }));
  const standing = [...there, ...others, { ...snap("0106", { uuid: "later" }), id: 2000 }];
  const strangers = ["s0101", "s0103", ...others.map(({ uuid }) => uuid)];

  test("are a list when they are few, else a rule that gives the same list", () => {
    expect(asWritten({ strangers: ["a"] }, standing, "")).toEqual({ strangers: ["a"] });
    const written = asWritten({ leaps: ["x"], strangers }, standing, "");
    expect(written).toEqual({ leaps: ["x"], elders: { until: 999, but: ["s0102", "s0104"] } });
    const read = asRead(written, standing, "");
    expect(read).toEqual({ ...written, strangers });
    expect(asWritten(read, standing, "")).toEqual(written);
    // Of some that are away for a while, the rule still tells; whoever is adopted anew has another.
    const fewer = standing.filter(({ uuid }) => !["o599", "o598", "s0102"].includes(uuid));
    expect(asWritten(asRead(written, fewer, ""), fewer, "")).toEqual(written);
    expect(asWritten(asRead(written, standing.slice(0, 5), ""), standing.slice(0, 5), "")).toEqual(
      written,
    );
    expect(asWritten({ ...read, strangers: ["s0101"] }, standing, "")).toEqual({
      leaps: ["x"],
      strangers: ["s0101"],
    });
    expect(parseRecord(`{"/": 1\n,"": ${JSON.stringify(written)}\n}\n`)).toEqual({
      chains: new Map([["", written]]),
      unreadable: null,
    });
  });

  test("those of other prefixes, and what came later, are none", () => {
    const other = {
      ...snap("0101", { uuid: "prefixed" }),
      name: `x${full("0101")}` as Snapshot["name"],
      id: 350,
    };
    expect(asRead({ elders: { until: 999, but: [] } }, [...there, other], "").strangers).toEqual(
      there.map(({ uuid }) => uuid),
    );
  });

  test.each([{ until: 1 }, { until: "1", but: [] }, { until: 1, but: [1] }])(
    "a rule that is none is not read: %j",
    (elders) =>
      expect(
        parseRecord(`{"/": 1\n,"": ${JSON.stringify({ elders })}\n}\n`).unreadable,
      ).not.toBeNull(),
  );
});

describe("parents", () => {
  const facts = (all: readonly Snapshot[], more: Partial<Facts> = {}): Facts => ({
    all: new Map(all.map((one) => [one.uuid, one])),
    ctransids: new Map(),
    births: new Map(),
    losses: new Map(),
    ...more,
  });
  const received = (short: string, parentUuid: string | null) =>
    snap(short, { receivedUuid: `r${short}`, parentUuid });

  test.each<
    [
      string,
      readonly [a: Snapshot, b: Snapshot],
      Snapshot[],
      Record<string, number | null>,
      boolean | undefined,
    ]
  >([
    [
      "what was taken here is, always",
      [snap("0101", { parentUuid: "old" }), snap("0102")],
      [],
      {},
      true,
    ],
    [
      "a received one that the source was made of is",
      [received("0101", null), snap("0102")],
      [snap("0001", { uuid: "source", parentUuid: "s0101" })],
      {},
      true,
    ],
    [
      "a received one that only shares files is not",
      [received("0101", null), snap("0102")],
      [snap("0001", { uuid: "source", parentUuid: null })],
      {},
      false,
    ],
    [
      "both from one that is gone are",
      [received("0101", "gone"), snap("0102")],
      [snap("0001", { uuid: "source", parentUuid: "gone" })],
      {},
      true,
    ],
    [
      "over a gap, it has to be asked",
      [received("0101", null), snap("0102")],
      [snap("0001", { uuid: "source", parentUuid: "gone" })],
      {},
      undefined,
    ],
    [
      "over a gap, the same top directory tells",
      [received("0101", null), snap("0102")],
      [snap("0001", { uuid: "source", parentUuid: "gone" })],
      { s0101: 7, s0102: 7 },
      true,
    ],
    [
      "over a gap, another top directory tells",
      [received("0101", null), snap("0102")],
      [snap("0001", { uuid: "source", parentUuid: "gone" })],
      { s0101: 7, s0102: 8 },
      false,
    ],
    [
      "over a gap, what cannot be told is not",
      [received("0101", null), snap("0102")],
      [snap("0001", { uuid: "source", parentUuid: "gone" })],
      { s0101: null, s0102: null },
      false,
    ],
    [
      "of received ones, one on top of the other is",
      [received("0101", null), received("0102", "s0101")],
      [],
      {},
      true,
    ],
    [
      "of received ones, two on top of a third are not",
      [received("0101", "s0100"), received("0102", "s0100")],
      [received("0100", null)],
      {},
      false,
    ],
    [
      "of received ones, two in full are not",
      [received("0101", null), received("0102", null)],
      [],
      {},
      false,
    ],
  ])("%s", (_, pair, others, births, expected) => {
    const known = facts([...pair, ...others], { births: new Map(Object.entries(births)) });
    expect(related(...pair, known)).toBe(expected);
    expect(related(pair[1], pair[0], known)).toBe(expected);
  });

  test.each<
    [string, Partial<Snapshot>, Record<string, number>, Record<string, number>, boolean | undefined]
  >([
    ["nothing was asked", { cgen: 7 }, {}, {}, undefined],
    ["as old as its source", { cgen: 7 }, { s0101: 7 }, {}, false],
    ["older than itself", { cgen: 7 }, { s0101: 5 }, {}, false],
    ["changed", { cgen: 7 }, { s0101: 8 }, {}, true],
    ["changed, and compared", { cgen: 7 }, { s0101: 8 }, { s0101: 8 }, false],
    ["changed again after it was compared", { cgen: 7 }, { s0101: 9 }, { s0101: 8 }, true],
    ["received", { cgen: 7, receivedUuid: "x" }, { s0101: 8 }, {}, false],
    ["no list told its generation", {}, { s0101: 8 }, {}, false],
  ])("a snapshot was changed: %s", (_, fields, ctransids, cleared, expected) =>
    expect(
      changedSince(
        snap("0101", fields),
        facts([], { ctransids: new Map(Object.entries(ctransids)) }),
        cleared,
      ),
    ).toBe(expected),
  );

  const taken = (short: string, cgen: number, parentUuid = "source") =>
    snap(short, { cgen, parentUuid });
  const source = (more: Partial<Snapshot> = {}) =>
    snap("0001", { uuid: "source", parentUuid: null, ...more });
  test.each<[string, readonly [one: Snapshot, of: Snapshot], Snapshot[], boolean]>([
    ["what was taken before", [taken("0101", 5), taken("0102", 6)], [source()], true],
    ["at the same moment", [taken("0101", 5), taken("0102", 5)], [source()], true],
    ["what was taken after", [taken("0102", 6), taken("0101", 5)], [source()], false],
    [
      "nobody knows when",
      [snap("0101", { parentUuid: "source" }), taken("0102", 6)],
      [source()],
      false,
    ],
    [
      "what the source was made of",
      [snap("0101"), taken("0102", 6)],
      [source({ parentUuid: "s0101" })],
      true,
    ],
    [
      "what was taken before that, of the source before",
      [taken("0101", 3, "old"), taken("0103", 9)],
      [source({ parentUuid: "s0102", cgen: 8 }), taken("0102", 4, "old")],
      true,
    ],
    [
      "what was taken after that, of the source before: the way led back",
      [taken("0102", 5, "old"), taken("0103", 9)],
      [source({ parentUuid: "s0101", cgen: 8 }), taken("0101", 4, "old")],
      false,
    ],
    [
      "where what the source was made of is gone, nobody knows",
      [taken("0101", 3, "old"), taken("0103", 9)],
      [source({ parentUuid: "gone", cgen: 8 })],
      false,
    ],
    [
      "what it was received on top of",
      [received("0101", null), received("0102", "s0101")],
      [],
      true,
    ],
    [
      "what was received on top of the same",
      [received("0102", "s0101"), received("0103", "s0101")],
      [received("0101", null)],
      false,
    ],
    [
      "what was received on top of what the source was made of",
      [{ ...received("0102", "s0101"), cgen: 5 }, taken("0103", 9)],
      [source({ parentUuid: "s0101", cgen: 8 }), received("0101", null)],
      false,
    ],
    ["over a gap, nobody knows", [received("0101", null), received("0103", "gone")], [], false],
  ])("an earlier state is %s", (_, [one, of], others, expected) =>
    expect(isEarlierState(one, of, facts([one, of, ...others]).all)).toBe(expected),
  );

  test.each<[string, Partial<Rewritten>, string | null]>([
    ["a file that is longer, and whose last block is the same", {}, "file"],
    ["of which that block is sent", { ranges: [{ from: 0, to: 4096 }] }, null],
    ["of which only what is behind is sent", { ranges: [{ from: 4096, to: 9000 }] }, "file"],
    ["a shorter one", { size: 99 }, null],
    ["a new one", { before: null }, null],
    ["one that was empty", { before: 0 }, null],
    [
      "one that ended where a block ends, however large blocks are",
      { before: 65536, size: 70000 },
      null,
    ],
  ])("what a difference would lose: %s", (_, fields, expected) => {
    const file: Rewritten = { path: "file", ranges: [], size: 3000, before: 100, ...fields };
    expect(lossIn([{ path: "other", ranges: [], size: 1, before: 1 }, file])).toBe(expected);
  });

  const {
    path: at,
    pathTo,
    offset,
    size,
    cloneLength,
    cloneUuid,
    cloneCtransid,
    clonePath,
    cloneOffset,
    xattrName,
    xattrData,
  } = attribute;
  const U = "00000001-aaaa-bbbb-cccc-0123456789ab";
  const difference = (...commands: Buffer[]) =>
    stream(
      command(
        "snapshot",
        at("s"),
        attribute.uuid(U),
        attribute.ctransid(7),
        cloneUuid(U),
        cloneCtransid(5),
      ),
      ...commands,
      command("end"),
    );
  /** In place of a command with data. */
  const extent = (path: string, from: number, length: number) =>
    command(22, at(path), offset(from), size(length));

  test("what a difference writes to is read from a stream without data", () => {
    const told = parseRewritten(
      difference(
        extent("plain/f1", 4096, 4096),
        extent("plain/f1", 8192, 10),
        command("truncate", at(Buffer.from("a b\\ä\n").toString("latin1")), size(3000)),
        command(
          "clone",
          at("c"),
          offset(0),
          cloneLength(5),
          cloneUuid(U),
          cloneCtransid(7),
          clonePath("x"),
          cloneOffset(0),
        ),
        command(
          "set_xattr",
          at("d"),
          xattrName("user.q"),
          xattrData("x\nwrite ./s/plain/f1 offset=0 len=99"),
        ),
      ),
    );
    expect([...told]).toEqual([
      [
        "plain/f1",
        [
          { from: 4096, to: 8192 },
          { from: 8192, to: 8202 },
        ],
      ],
      ["a b\\ä\n", []],
      ["c", [{ from: 0, to: 5 }]],
    ]);
    const whole = difference(extent("f", 0, 1));
    for (const bytes of [
      Buffer.from("something else, and long enough"),
      whole.subarray(0, -1),
      whole.subarray(0, -10),
      whole.subarray(0, 40),
    ])
      expect(() => parseRewritten(bytes)).toThrow(/btrfs send/);
    expect(() => parseRewritten(difference(command(22, at("f"), offset(0))))).toThrow(
      "left something out",
    );
    expect(() => parseRewritten(difference(command(99, at("f"))))).toThrow("unknown");
    expect(() => parseRewritten(difference(extent("caf\xe9", 0, 1)))).toThrow("not UTF-8");
  });

  test("what is renamed after it was written to is followed, and so is what is below it", () => {
    const paths = (...commands: Buffer[]) => [...parseRewritten(difference(...commands)).keys()];
    const write = (path: string) => extent(path, 0, 1);
    const rename = (from: string, to: string) => command("rename", at(from), pathTo(to));
    expect(
      paths(write("old/f"), rename("old", "o257-7-0"), write("old/f"), rename("o257-7-0", "new")),
    ).toEqual(["old/f", "new/f"]);
    expect(paths(rename("a", "b"), write("a"))).toEqual(["a"]);
    expect(paths(write("a b/c"), rename("a b", "d e"))).toEqual(["d e/c"]);
    expect(paths(write("x/f"), rename("x", "x/y"))).toEqual(["x/y/f"]);
    expect(() => paths(write("a"), command("unlink", at("a")))).toThrow("loses");
    expect(paths(write("a"), command("unlink", at("b")))).toEqual(["a"]);
  });

  test("an earlier state is preferred to what is nearer, and a later one is the last", () => {
    const s = snaps("0101 0102 0103 0104 0105 0106 0107 0108");
    const options = {
      policy: null,
      incremental: true,
      newestOnly: false,
      backfill: true,
      now: FAR,
      fullEvery: null,
    };
    const plan = (held: string, earlier: string, bad = "") => {
      const fitness = {
        unfit: ({ uuid }: Snapshot) => (bad.includes(shortOf(uuid)) ? `not ${uuid}` : null),
        isEarlier: ({ uuid }: Snapshot) => earlier.includes(shortOf(uuid)),
      };
      return planTransfers(
        s,
        standing(snaps(held).map((one) => backupOf(one))),
        options,
        fitness,
      ).transfers.find(({ snapshot }) => snapshot === s[4])?.parent?.uuid;
    };
    const all = "0101 0102 0103 0104 0106 0107 0108";
    expect(plan(all, "0101 0102")).toBe("s0102");
    expect(plan(all, "")).toBe("s0104");
    expect(plan(all, "", "0104")).toBe("s0103");
    expect(plan(all, "", "0104 0103")).toBe("s0106");
    expect(plan(all, "", "0104 0103 0106")).toBeUndefined();
    expect(plan("0106 0107 0108", "0101 0102 0103 0104", "0101 0102 0103 0104")).toBe("s0106");
  });

  test("the nearest that is fit is taken, and why no nearer one; in full with the reason if there is none", () => {
    const s = snaps("0101 0102 0103 0104");
    const options = {
      policy: null,
      incremental: true,
      newestOnly: false,
      now: FAR,
      fullEvery: null,
    };
    const plan = (...bad: string[]) =>
      planTransfers(s, standing(s.slice(0, 3).map((one) => backupOf(one))), options, {
        unfit: (parent) => (bad.includes(shortOf(parent.uuid)) ? `not ${parent.name}` : null),
        isEarlier: () => true,
      }).transfers;
    expect(plan()).toEqual([{ snapshot: s[3] as Snapshot, parent: s[2] as Snapshot }]);
    expect(plan("0103")).toEqual([
      { snapshot: s[3] as Snapshot, parent: s[1] as Snapshot, why: `not ${full("0103")}` },
    ]);
    expect(plan("0101", "0102", "0103")).toEqual([
      { snapshot: s[3] as Snapshot, parent: null, why: `not ${full("0103")}` },
    ]);
  });
});

describe("a clock that leaps", () => {
  const HOUR = 3600e3;
  const daily = (from: string, days: number) =>
    Array.from({ length: days }, (_, i) => at(from) + i * 24 * HOUR);
  const dated = (times: readonly number[]) =>
    times.map((time) => ({ name: new Date(time).toISOString(), time }));

  test.each<[string, number[], number[]]>([
    ["nothing", [], []],
    ["one snapshot", [at("0101")], []],
    ["daily", daily("0101", 31), []],
    [
      "an hour back in autumn",
      [at("1024-0200"), at("1025-0230"), at("1025-0200"), at("1026-0200")],
      [],
    ],
    ["an hour forward in spring", [at("0328-0200"), at("0329-0300"), at("0330-0200")], []],
    [
      "25 hours back over the date line",
      [...daily("0101", 5), at("0105") - 25 * HOUR, at("0106")],
      [],
    ],
    ["27 hours back", [...daily("0101", 5), at("0105") - 27 * HOUR, at("0106")], [5]],
    [
      "a laptop away for 60 days, by a weekly habit",
      [
        ...Array.from({ length: 9 }, (_, i) => at("0101") + i * 7 * 24 * HOUR),
        at("0101") + 116 * 24 * HOUR,
      ],
      [],
    ],
    [
      "a laptop away for 60 days, by a daily habit",
      [...daily("0101", 9), at("0109") + 60 * 24 * HOUR],
      [9],
    ],
    ["29 days after one other", [at("0101"), at("0101") + 29 * 24 * HOUR], []],
    ["a year after one other", [at("0101"), at("0101") + 365 * 24 * HOUR], [1]],
    ["at 1970, and right again", [...daily("0101", 9), 5000, at("0110"), at("0111")], [9]],
    [
      "a year ahead, and back",
      [...daily("0101", 9), at("0110") + 365 * 24 * HOUR, at("0111"), at("0112")],
      [9, 10],
    ],
    [
      "a disk that comes each 40 days",
      [0, 1, 2, 3].map((i) => at("0101") + i * 40 * 24 * HOUR),
      [1],
    ],
  ])("%s", (_, times, expected) => expect(leapsAmong(dated(times))).toEqual(expected));

  const policy = (text: string) => parsePolicy(text);
  const goes = (times: readonly number[], text = "14d+", adopted: string[] = []) => {
    const all = times.map((time, i) =>
      snap("0101", { name: named(String(i)), time, moment: time, uuid: `s${i}` }),
    );
    return planSource(all, [], { policy: policy(text), now: FAR, adopted })
      .filter(({ reasons }) => reasons.length === 0)
      .map(({ entry }) => Number(entry.name));
  };
  const upTo = (n: number) => Array.from({ length: n }, (_, i) => i);
  const year = at("0101") + 400 * 24 * HOUR;
  const ahead = (days: number) => [
    ...daily("0101", 31),
    ...Array.from({ length: days }, (_, i) => year + i * 24 * HOUR),
  ];

  test("deletes nothing until there is something of three days, then all but the newest three from before, then these", () => {
    expect([1, 2].map((days) => goes(ahead(days)))).toEqual([[], []]);
    expect(goes([...ahead(1), year + HOUR, year + 2 * HOUR])).toEqual([]);
    expect(goes(ahead(3))).toEqual(upTo(28));
    // Much later, and nothing was deleted until then.
    expect(goes(ahead(9))).toEqual(upTo(28));
    expect(goes(ahead(9).slice(28))).toEqual(upTo(3));
  });

  test("has a name, which is remembered as long as it stands there", () => {
    const all = ahead(2).map((time, i) => ({ name: String(i), time }));
    expect(leapNames([all, all.slice(0, 5)])).toEqual(["31"]);
    expect(leapNames([all.slice(31)], ["31", "7"])).toEqual(["31"]);
  });

  test("does not matter to numbers", () => expect(goes(ahead(1), "2")).toEqual(upTo(30)));

  test("is believed when it is adopted; the newest three from before stay then as well", () => {
    expect(goes(ahead(1), "14d+", ["31"])).toEqual(upTo(28));
    expect(goes(ahead(1).slice(29), "14d+", ["2"])).toEqual([]);
    expect(goes(ahead(1), "14d+", ["30"])).toEqual([]);
  });

  test("keeps what a destination has, and makes no room, either", () => {
    const all = ahead(1).map((time, i) =>
      backupOf(snap("0101", { name: named(String(i)), time, moment: time, uuid: `s${i}` })),
    );
    const kept = { backups: all, copied: new Map(), chained: null };
    expect(
      planDestination([], kept, { policy: policy("14d+"), now: FAR }).filter(
        ({ reasons }) => reasons.length === 0,
      ),
    ).toEqual([]);
    expect(leaptTo(planDestination([], kept, { policy: policy("14d+"), now: FAR }))).toBe("31");
    expect(
      planRoom(
        [],
        { ...kept, backups: all.slice(0, 31) },
        [
          {
            snapshot: snap("0101", { name: named("31"), time: year, moment: year, uuid: "new" }),
            parent: null,
          },
        ],
        { policy: policy("14d+"), now: FAR },
      ),
    ).toEqual([]);
  });
});

describe("retention at a destination", () => {
  const s = snaps("0101 0102 0103 0104 0105");
  const all = s.map((snapshot) => backupOf(snapshot));

  test.each<[string, policy: string, kept: string]>([
    ["the policy alone decides when the newest is shared", "2", "0104 0105"],
    ["everything", "0", "0101 0102 0103 0104 0105"],
    ["calendar words", "*m", "0101 0105"],
  ])("%s", (_, policy, expected) =>
    expect(
      kept(
        planDestination(
          s,
          { backups: all, copied: new Map(), chained: null },
          { policy: parsePolicy(policy), now: FAR },
        ),
      ),
    ).toBe(expected),
  );

  test("what is shared with the source stays, whatever the policy", () => {
    const decisions = planDestination(
      s.slice(0, 2),
      { backups: all, copied: new Map(), chained: null },
      { policy: parsePolicy("1"), now: FAR },
    ); // 0103 and later are gone at the source
    expect(kept(decisions)).toBe("0102 0105");
    expect(reasonsOf(decisions, "0102")).toEqual(["shared with the source"]);
  });

  test("the newest is the source's newest, not the one that arrived last, nor the last by name", () => {
    const here = snaps("1027-0230 1027-0215");
    expect(
      kept(
        planDestination(
          here,
          { backups: here.toReversed().map((x) => backupOf(x)), copied: new Map(), chained: null },
          { policy: parsePolicy("1"), now: FAR },
        ),
      ),
    ).toBe("1027-0215");
  });

  test("a source without snapshots takes nothing away from the policy", () => {
    expect(
      kept(
        planDestination(
          [],
          { backups: all, copied: new Map(), chained: null },
          { policy: parsePolicy("2"), now: FAR },
        ),
      ),
    ).toBe("0104 0105");
    expect(
      planDestination(
        s,
        { backups: [], copied: new Map(), chained: null },
        { policy: parsePolicy("2"), now: FAR },
      ),
    ).toEqual([]);
  });
});

describe("retention at the source", () => {
  const s = snaps("0101 0102 0103 0104 0105");
  const claimant = (id: string, pin: string | null, rest: Partial<Claimant> = {}): Claimant => ({
    id,
    pin: pin === null ? null : { uuid: `s${pin}` },
    unread: false,
    unsentPolicy: null,
    ...rest,
  });
  test.each<[string, policy: string, claimants: Claimant[], kept: string]>([
    ["no destination", "1", [], "0105"],
    ["everything", "0", [], "0101 0102 0103 0104 0105"],
    ["every pin stays", "1", [claimant("a", "0102"), claimant("b", "0104")], "0102 0104 0105"],
    [
      "a pin stays while its destination cannot be read",
      "1",
      [claimant("a", "0102", { unread: true })],
      "0102 0105",
    ],
    ["a pin that is gone holds nothing", "1", [claimant("a", "0099"), claimant("b", null)], "0105"],
    [
      "nothing is known of a destination that could not be read: all stay",
      "1",
      [claimant("a", null, { unread: true }), claimant("b", "0105")],
      "0101 0102 0103 0104 0105",
    ],
    [
      "a destination that was read and shares nothing holds nothing",
      "1",
      [claimant("a", null)],
      "0105",
    ],
    [
      "--keep-unsent: what its policy would still want after its pin",
      "1",
      [claimant("a", "0102", { unsentPolicy: { policy: null } })],
      "0102 0103 0104 0105",
    ],
    [
      "--keep-unsent: limited by its policy",
      "1",
      [claimant("a", "0102", { unsentPolicy: { policy: parsePolicy("2") } })],
      "0102 0104 0105",
    ],
    [
      "--keep-unsent: for a destination that has nothing yet",
      "1",
      [claimant("a", null, { unsentPolicy: { policy: parsePolicy("3") } })],
      "0103 0104 0105",
    ],
  ])("%s", (_, policy, claimants, expected) =>
    expect(kept(planSource(s, claimants, { policy: parsePolicy(policy), now: FAR }))).toBe(
      expected,
    ),
  );

  test("the reasons name the destination", () => {
    const decisions = planSource(
      s,
      [
        claimant("/disk", "0102", { unsentPolicy: { policy: null } }),
        claimant("/new", null, { unread: true }),
      ],
      { policy: parsePolicy("1"), now: FAR },
    );
    expect(reasonsOf(decisions, "0102")).toEqual([
      "shared with /disk",
      "nothing is known of /new yet",
    ]);
    expect(reasonsOf(decisions, "0103")).toEqual([
      "not yet sent to /disk",
      "nothing is known of /new yet",
    ]);
  });

  test("what is only kept to be sent is counted for whom, from when on; of a full disk the older half of it goes, never a pin", () => {
    const claimants = [
      claimant("/disk", "0101", { unsentPolicy: { policy: null } }),
      claimant("/other", "0102", { unsentPolicy: { policy: null } }),
    ];
    const decisions = planSource(s, claimants, { policy: parsePolicy("1"), now: FAR });
    expect(kept(decisions)).toBe("0101 0102 0103 0104 0105");
    expect([...unsentIn(decisions)]).toEqual([
      ["/disk", { count: 2, oldest: full("0103") }],
      ["/other", { count: 2, oldest: full("0103") }],
    ]);
    expect(kept(planSource(s, claimants, { policy: parsePolicy("1"), now: FAR, full: true }))).toBe(
      "0101 0102 0104 0105",
    );
    expect(kept(planSource(s, claimants, { policy: parsePolicy("0"), now: FAR, full: true }))).toBe(
      "0101 0102 0103 0104 0105",
    );
    expect([...unsentIn(planSource(s, claimants, { policy: parsePolicy("5"), now: FAR }))]).toEqual(
      [],
    );
  });

  test("the newest is the one with the highest ID when clocks went back", () => {
    expect(
      kept(planSource(snaps("1027-0230 1027-0215"), [], { policy: parsePolicy("1"), now: FAR })),
    ).toBe("1027-0215");
  });
});

describe("making room", () => {
  const s = snaps("0101 0102 0103 0104 0105");
  const backups = (...numbers: number[]) => numbers.map((n) => backupOf(s[n - 1] as Snapshot));
  const room = (held: readonly Backup[], policy: string, here = s) => {
    const place = standing(held);
    const { transfers } = planTransfers(here, place, {
      policy: parsePolicy(policy),
      incremental: true,
      newestOnly: false,
      now: FAR,
      fullEvery: null,
    });
    const goes = planRoom(here, place, transfers, { policy: parsePolicy(policy), now: FAR });
    return { transfers, goes, names: goes.map(({ uuid }) => shortOf(uuid)).join(" ") };
  };

  test.each<[string, held: number[], policy: string, goes: string]>([
    ["what the policy drops once the new one is there", [1, 2, 3, 4], "2", "0101 0102 0103"],
    [
      "never the parent and newest, though the policy will drop it",
      [1, 2, 3, 4],
      "1",
      "0101 0102 0103",
    ],
    [
      "only what it drops with the first of those to come: the others may not arrive",
      [1, 2, 3],
      "3",
      "0101",
    ],
    ["nothing, when everything is kept", [1, 2, 3, 4], "0", ""],
    ["nothing, when nothing is there", [], "1", ""],
  ])("%s", (_, held, policy, goes) => expect(room(backups(...held), policy).names).toBe(goes));

  test("never the newest complete backup, though its snapshot is gone at the source and it is no parent", () => {
    const here = s.filter((_, i) => i !== 3); // 0104 is gone
    expect(room(backups(1, 2, 3, 4), "1", here).names).toBe("0101 0102"); // 0103 is the parent, 0104 the newest
  });

  test("never the parent, though the policy drops it and newer ones are shared", () => {
    const [first, missing] = s as [Snapshot, Snapshot];
    const place = standing(backups(1, 3));
    expect(
      planRoom(s, place, [{ snapshot: missing, parent: first }], {
        policy: parsePolicy("1"),
        now: FAR,
      }),
    ).toEqual([]);
  });

  test("never what is shared with the source, though it is neither the parent nor the newest", () => {
    const here = [snap("0201"), snap("0202"), snap("0203"), snap("0204")] as const;
    const gone = backupOf(snap("0301"));
    const [first, , third, last] = here;
    // In full, as with -I: there is no parent. 0203 is shared, "0301" is the newest there by name.
    const place = standing([backupOf(first), backupOf(third), gone]);
    expect(
      planRoom(here, place, [{ snapshot: last, parent: null }], {
        policy: parsePolicy("1"),
        now: FAR,
      }).map(({ uuid }) => uuid),
    ).toEqual(["b0201"]);
  });

  test("never the parent of a transfer that is still to come", () => {
    const here = snaps("0301-00 0302-00 0302-01 0303-00 0303-01 0304-00");
    const held = [0, 2, 4].map((i) => backupOf(here[i] as Snapshot));
    const { transfers, goes } = room(held, "*d", here);
    const find = dataFinder(goes);
    expect(transfers.map(({ parent }) => parent && find(parent)?.name).filter(Boolean)).toEqual([]);
  });
});

describe("one chain, one owner", () => {
  const me: SourceIdentity = { uuid: "source", host: "here", path: "/home" };
  const other: SourceIdentity = { uuid: "other", host: "there", path: "/srv" };
  // Two chains in one folder: a1 <- a2 <- a3 and x1 <- x2, each received on top of its parent.
  const a1 = backupOf(snap("0101"), { uuid: "a1", parentUuid: null });
  const a2 = backupOf(snap("0102"), { uuid: "a2", parentUuid: "a1" });
  const a3 = backupOf(snap("0103"), { uuid: "a3", parentUuid: "a2" });
  const x1 = backupOf(snap("0104"), { uuid: "x1", parentUuid: null });
  const x2 = backupOf(snap("0105"), { uuid: "x2", parentUuid: "x1" });
  type Case = [
    string,
    {
      chain: ChainRecord;
      there: Backup[];
      shared: Backup[];
      identity?: SourceIdentity;
      adopt?: boolean;
    },
    strangers: string[] | null,
  ];
  test.each<Case>([
    ["the owner comes back", { chain: { owner: me }, there: [a1, a2], shared: [a2] }, []],
    [
      "the owner comes back after its snapshots are gone",
      { chain: { owner: me }, there: [a1, a2], shared: [] },
      [],
    ],
    [
      "the owner comes back, moved: the newest backup is known",
      { chain: { owner: { ...me, path: "/old", host: "old" } }, there: [a1, a2], shared: [a2] },
      [],
    ],
    [
      "the owner comes back, moved, to a folder that is empty by now",
      { chain: { owner: { ...me, host: "old" } }, there: [], shared: [] },
      [],
    ],
    [
      "a clone: the same UUID on another host, which does not know the newest backup",
      { chain: { owner: { ...me, host: "original" } }, there: [a1, a2], shared: [a1] },
      null,
    ],
    [
      "a clone at another path",
      { chain: { owner: { ...me, path: "/original" } }, there: [a1, a2], shared: [] },
      null,
    ],
    [
      "strangers do not tell of a clone",
      {
        chain: { owner: { ...me, host: "old" }, strangers: ["x1"] },
        there: [a1, x1],
        shared: [a1],
      },
      ["x1"],
    ],
    [
      "a clone that adopts: what the original has sent since is never pruned",
      {
        chain: { owner: { ...me, host: "original" } },
        there: [a1, a2, a3],
        shared: [a2],
        adopt: true,
      },
      ["a3"],
    ],
    [
      "the owner's recorded strangers stay so",
      { chain: { owner: me, strangers: ["x1"] }, there: [a1, x1], shared: [a1] },
      ["x1"],
    ],
    [
      "a restored source: other UUID, same place, shared data",
      { chain: { owner: { ...me, uuid: "before" } }, there: [a1, a2], shared: [a1] },
      [],
    ],
    [
      "another source made at the same place: nothing shared",
      { chain: { owner: { ...me, uuid: "before" } }, there: [a1], shared: [] },
      null,
    ],
    [
      "the same host is not enough",
      { chain: { owner: { ...other, host: "here" } }, there: [a1], shared: [a1] },
      null,
    ],
    [
      "the same path is not enough",
      { chain: { owner: { ...other, path: "/home" } }, there: [a1], shared: [a1] },
      null,
    ],
    ["an empty folder", { chain: {}, there: [], shared: [] }, []],
    [
      "no record, as 0.3.1 left it, all linked to this source",
      { chain: {}, there: [a1, a2, a3], shared: [a3] },
      [],
    ],
    [
      "no record, what came after the shared one is not linked",
      { chain: {}, there: [a1, a2, a3], shared: [a2] },
      ["a3"],
    ],
    [
      "no record, mixed by 0.3.1",
      { chain: {}, there: [a1, a2, a3, x1, x2], shared: [a2, a3] },
      ["x1", "x2"],
    ],
    ["no record, nothing shared", { chain: {}, there: [x1, x2], shared: [] }, null],
    ["another's", { chain: { owner: other }, there: [x1, x2], shared: [] }, null],
    [
      "another's, though data is shared",
      { chain: { owner: other }, there: [a1, x1], shared: [a1] },
      null,
    ],
    [
      "another's, adopted: what was there is never pruned",
      { chain: { owner: other }, there: [x1, x2], shared: [], adopt: true },
      ["x1", "x2"],
    ],
    ["no record, adopted", { chain: {}, there: [x1, a1], shared: [a1], adopt: true }, ["x1"]],
    [
      "adopted again and again, each stranger is recorded once",
      {
        chain: { owner: other, strangers: ["x1"] },
        there: [x1, x2, a1],
        shared: [a1],
        adopt: true,
      },
      ["x1", "x2"],
    ],
    [
      "--adopt changes nothing for the owner",
      { chain: { owner: me }, there: [a1, x1], shared: [a1], adopt: true },
      [],
    ],
  ])("%s", (_, { chain, there, shared, identity = me, adopt = false }, strangers) => {
    const claimed = judgeClaim({
      identity,
      chain,
      standing: there,
      shared,
      adopt,
      isMember: false,
    });
    expect(claimed.accepted ? claimed.strangers : null).toEqual(strangers);
  });

  test("in a tree: another subvolume at the same path, and the former one again", () => {
    const claim = (chain: ChainRecord, shared: Backup[], identity = me) =>
      judgeClaim({
        identity,
        chain,
        standing: [a1, a2, a3, x1],
        shared,
        adopt: false,
        isMember: true,
      });
    const anew = { ...me, uuid: "anew" };
    const accepted = (strangers: string[]) => ({ accepted: true, strangers }) as const;
    const all = [a1, a2, a3, x1].map(({ uuid }) => uuid);
    expect(claim({ owner: me }, [], anew)).toEqual(accepted(all));
    // What was made there meanwhile is the other one's, and its own are its own.
    const strangers = [a1, a2, a3].map(({ uuid }) => uuid);
    expect(claim({ owner: anew, strangers }, [a1, a3])).toEqual(accepted(["x1"]));
    // Restored, it goes on with all that it had.
    expect(claim({ owner: anew, strangers: ["x1"] }, [a1])).toEqual(accepted(["x1"]));
    expect(claim({ owner: { ...anew, path: "/other" } }, []).accepted).toBe(false);
  });

  test("a refusal names both sources and what to do", () => {
    const claimed = judgeClaim({
      identity: me,
      chain: { owner: other },
      standing: [x1],
      shared: [],
      adopt: false,
      isMember: false,
    });
    for (const text of [
      "there:/srv",
      "subvolume other",
      "here:/home",
      "subvolume source",
      "-p",
      "another folder",
      "--adopt",
    ])
      expect(claimed.accepted ? "" : refusalMessage(claimed)).toContain(text);
  });
});

describe("order in a snapshot folder", () => {
  const entry = ({ time: _, ...rest }: Snapshot) => rest;
  const names = (...snapshots: Snapshot[]) =>
    snapshotsAmong(snapshots.map(entry), "", "source")
      .map(({ uuid }) => shortOf(uuid))
      .join(" ");

  test("what was taken of the source as it is stands by ID, behind what came with a restore", () => {
    const [late, early] = [snap("0302-03"), snap("0302-02")]; // the clock went back between the two
    expect(names(early, late)).toBe("0302-03 0302-02");
    // Moved from the source before: by ID among themselves; received: by name; the new one is last, whatever it is called.
    expect(
      names(snap("0201"), snap("0305", { parentUuid: "old" }), snap("0304", { parentUuid: "old" })),
    ).toBe("0305 0304 0201");
    expect(
      names(
        snap("0305", { parentUuid: "old", receivedUuid: "x5" }),
        snap("0304", { parentUuid: "old", receivedUuid: "x4" }),
        snap("0201"),
      ),
    ).toBe("0304 0305 0201");
  });

  test("only what has the prefix and a date; a folder of backups is in order of names", () => {
    const all = [snap("0302"), snap("0301")].map(entry);
    expect(
      snapshotsAmong(
        [
          ...all,
          { ...entry(snap("0303")), name: named(`x${full("0303")}`) },
          { ...entry(snap("0304")), name: named("photos") },
        ],
        "",
        null,
      ).map(({ name }) => name),
    ).toEqual([named(full("0302")), named(full("0301"))]);
    expect(
      snapshotsAmong(
        all.map((one) => ({ ...one, receivedUuid: one.uuid })),
        "",
        null,
      ).map(({ name }) => name),
    ).toEqual([named(full("0301")), named(full("0302"))]);
  });

  test.each<[string[], string[]]>([
    [[], []],
    [["20240101-000000", "20240102-000000"], [""]],
    [
      ["home-20240101-000000", "20240102-000000", "etc-20240101-000000", "home-20240103-000000"],
      ["", "etc-", "home-"],
    ],
    [["photos", "20240101", "x-20240231-000000", ".btrfs-backup.json", "20240101-000000.old"], []],
    [["20240101-00000020240101-000000"], ["20240101-000000"]],
  ])("prefixes of %p", (entries, prefixes) =>
    expect(prefixesIn(entries.map((name) => ({ name: named(name) })))).toEqual(prefixes),
  );
});

/** A folder as it was opened: of backups, or (with a subvolume that they were taken of) of snapshots. */
const folder = (snapshots: readonly Snapshot[], fields: Partial<Folder> = {}): Folder =>
  ({
    id: "/place",
    path: "/place",
    snapshots,
    standing: snapshots,
    entries: new Set(snapshots.map(({ name }) => name)),
    store: null,
    prefix: "",
    chain: {},
    source: null,
    subvolumes: snapshots,
    place: { filesystem: "fs" },
    record: { chains: new Map(), unreadable: null },
    old: { parents: new Map(), receiving: new Map() },
    ...fields,
  }) as unknown as Folder;
const sourceFolder = (snapshots: readonly Snapshot[], fields: Partial<Folder> = {}) =>
  folder(snapshots, { source: { uuid: "source" } as Folder["source"], ...fields });

describe("whose folder it is", () => {
  const owner = (uuid: string) => ({ owner: { uuid, host: "h", path: "/home" } });
  test.each<[string, Partial<Folder>, readonly Snapshot[], boolean]>([
    [
      "a source's, as it was asked for",
      { source: { uuid: "source" } as Folder["source"] },
      [],
      true,
    ],
    ["nothing there", {}, [], false],
    ["received backups", {}, [backupOf(snap("0301"))], false],
    ["snapshots that were taken there", {}, [snap("0301")], true],
    [
      "the owner is on this filesystem",
      { chain: owner("source"), subvolumes: [snap("0301", { uuid: "source" })] },
      [backupOf(snap("0301"))],
      true,
    ],
    [
      "the owner is lost, its snapshots are there",
      { chain: owner("source") },
      [snap("0301")],
      true,
    ],
    ["the owner is its top level", { chain: owner("fs") }, [], true],
    ["the owner is elsewhere", { chain: owner("away") }, [snap("0301")], false],
    ["it has destinations", { chain: { destinations: [] } }, [], true],
    [
      "backups that are copied on: an owner and destinations",
      { chain: { ...owner("away"), destinations: [] } },
      [backupOf(snap("0301"))],
      false,
    ],
  ])("%s", (_, fields, snapshots, own) =>
    expect(isSnapshotFolder(folder(snapshots, fields))).toBe(own),
  );
});

describe("side by side", () => {
  const [s1, s2, s3] = snaps("0301 0302 0303") as [Snapshot, Snapshot, Snapshot];
  /** Rows, newest last: the name's day, and what each column has. */
  const rows = (...columns: (Folder | null)[]) =>
    align(columns)
      .map(
        ({ name, cells }) =>
          `${name.slice(4, 8)}:${cells.map((cell) => cell?.state[0] ?? "-").join("")}`,
      )
      .join(" ");

  test.each<[string, (Folder | null)[], string]>([
    ["nothing", [sourceFolder([])], ""],
    [
      "the same data is one row",
      [sourceFolder([s1, s2, s3]), folder([backupOf(s1), backupOf(s3)])],
      "0301:ww 0302:w- 0303:ww",
    ],
    [
      "what is gone at the source stands by its name",
      [sourceFolder([s3]), folder([backupOf(s1), backupOf(s3)]), folder([backupOf(s1)])],
      "0301:-ww 0303:ww-",
    ],
    [
      "a place that could not be read",
      [sourceFolder([s1]), null, folder([backupOf(s1)])],
      "0301:w-w",
    ],
    [
      "incomplete: writable, or never received",
      [
        sourceFolder([s1, s2]),
        folder(
          [backupOf(s1, { readonly: false }), snap("0302", { uuid: "other", readonly: true })],
          { chain: { owner: { uuid: "away", host: "", path: "" } } },
        ),
      ],
      "0301:wi 0302:wi",
    ],
    [
      "other data by the name",
      [sourceFolder([s1]), folder([backupOf(s1, { receivedUuid: "else" })])],
      "0301:wo",
    ],
    [
      "renamed: data decides, not the name",
      [
        sourceFolder([s1, s2]),
        folder([backupOf(s1, { name: named(full("0302")), time: at("0302") })]),
      ],
      "0301:ww 0302:w-",
    ],
    [
      "a restored source's snapshot, received from a backup",
      [
        sourceFolder([snap("0301", { receivedUuid: "x" })]),
        folder([backupOf(s1, { receivedUuid: "x" })]),
      ],
      "0301:ww",
    ],
    [
      "a copy of a copy",
      [folder([backupOf(s1)]), folder([backupOf(s1, { uuid: "c" })])],
      "0301:ww",
    ],
  ])("%s", (_, columns, expected) => expect(rows(...columns)).toBe(expected));

  test("a table marks the pin, and what the policies would delete", () => {
    const [a, b] = [backupOf(s1), backupOf(s2)];
    const known: KnownDestination[] = [
      { location: "/b", filesystem: "fsb", pin: { name: s2.name, uuid: s2.uuid }, last: null },
      {
        location: "shell://x",
        filesystem: null,
        pin: { name: s1.name, uuid: s1.uuid },
        last: null,
      },
    ];
    const column = (id: string, held: Folder | null) => ({ id, folder: held, problem: null });
    const columns = [
      column("/a", sourceFolder([s1, s2, s3], { chain: { destinations: known } })),
      column("/b", folder([a, b])),
      column("shell://x", null),
    ];
    const marks = (policies: Parameters<typeof inventory>[1]) =>
      inventory(columns, policies, FAR, new Map()).snapshots.map(({ at: all }) =>
        all
          .map((mark) =>
            mark === null ? "-" : `${mark.state?.[0]}${mark.pin ? "p" : ""}${mark.goes ? "!" : ""}`,
          )
          .join(" "),
      );
    expect(marks({ sourcePolicy: null, backupPolicy: null })).toEqual([
      "w - ?",
      "w wp ?",
      "w w ?p",
    ]);
    expect(marks({ sourcePolicy: parsePolicy("1"), backupPolicy: parsePolicy("1") })).toEqual([
      "w - ?",
      "w wp ?",
      "w w! ?p",
    ]);
  });
});

describe("restoring", () => {
  const [s1, s2, s3] = snaps("0301 0302 0303") as [Snapshot, Snapshot, Snapshot];
  const [b1, b2, b3] = [s1, s2, s3].map((s) => backupOf(s)) as [Backup, Backup, Backup];
  const planned = (chosen: Snapshot, there: readonly Snapshot[]) => {
    const { present, parent } = planRestore(chosen, [b1, b2, b3], there);
    return present !== null ? `has ${present.uuid}` : (parent?.uuid ?? "full");
  };
  const received = (of: Backup, uuid: string) => backupOf(of, { uuid });

  test.each<[string, Snapshot, readonly Snapshot[], string]>([
    ["nothing shared: in full", b2, [], "full"],
    ["something else is there", b2, [snap("0302", { uuid: "else" })], "full"],
    ["the source's own snapshots are still there: the closest earlier", b3, [s1, s2], "b0302"],
    ["only a later one: that", b1, [s2, s3], "b0302"],
    ["an earlier restore's", b3, [received(b1, "r1")], "b0301"],
    ["the very same, received before: nothing travels", b2, [received(b2, "r2")], "has r2"],
    ["the source's own is no ready copy, but the best parent", b2, [s1, s2], "b0302"],
  ])("%s", (_, chosen, there, expected) => expect(planned(chosen, there)).toBe(expected));

  test("leftovers are what this program calls so, each with its subvolumes innermost first", () => {
    const [ours, theirs] = ["home.restoring-20240301-000000", "home.restoring-yesterday"];
    const paths = [
      `${ours}/mine`,
      `${ours}/tree/nested`,
      `${ours}/tree`,
      `${ours}/tree/snapshot/20240301-000000`,
      `${ours}/20240301-000000`,
      `${theirs}/tree`,
      `other/${ours}/tree`,
    ];
    const place = {
      top: "/",
      entries: new Set(["home", ours, theirs, "home2.restoring-20240301-000000"]),
      subvolumes: paths.map((path, i) => ({ ...s1, id: i, path })),
    };
    expect([...leftoversOf("home", place)]).toEqual([
      [ours, ["./tree/snapshot/20240301-000000", "./tree", "./20240301-000000"]],
    ]);
    expect([...leftoversOf("home", { ...place, top: "/other" })]).toEqual([[ours, ["./tree"]]]);
    expect([...leftoversOf("hom", place)]).toEqual([]);
  });

  test("what a restored record says: only what stands is a pin, and where it came from shares it", () => {
    const known = (
      location: string,
      pin: string | null,
      filesystem: string | null = location,
    ): KnownDestination => ({
      location,
      filesystem,
      pin: pin === null ? null : { name: full(pin), uuid: `s${pin}` },
      last: "2024-03-01T00:00:00.000Z",
    });
    const pins = (list: readonly KnownDestination[]) =>
      list.map(({ location, pin }) => `${location} ${pin?.uuid ?? "-"}`);
    const came = { id: "/b", filesystem: "fsb", pin: { name: "n", uuid: "restored" } };
    const recorded = [known("/a", "0301"), known("/c", "0302"), known("shell://x", "0301", null)];
    expect(pins(restoredDestinations(recorded, (uuid) => uuid === "s0302", null))).toEqual([
      "/a -",
      "/c s0302",
      "shell://x -",
    ]);
    expect(pins(restoredDestinations(recorded, () => false, came))).toEqual([
      "/a -",
      "/c -",
      "shell://x -",
      "/b restored",
    ]);
    expect(pins(restoredDestinations([known("/b", "0301")], () => false, came))).toEqual([
      "/b restored",
    ]);
    // The same disk, mounted elsewhere for the restore; but not another folder on it, nor one of two.
    expect(
      pins(restoredDestinations([known("ssh://h/b", "0301", "fsb")], () => false, came)),
    ).toEqual(["ssh://h/b restored"]);
    expect(
      pins(restoredDestinations([known("/mnt/other", "0301", "fsb")], () => true, came)),
    ).toEqual(["/mnt/other s0301", "/b restored"]);
    expect(
      pins(
        restoredDestinations(
          [known("/mnt/1/b", "0301", "fsb"), known("/mnt/2/b", "0302", "fsb")],
          () => true,
          came,
        ),
      ),
    ).toEqual(["/mnt/1/b s0301", "/mnt/2/b s0302", "/b restored"]);
  });

  test("advice for a mount point has the user's own names", () => {
    const subvolume = mountAdvice(["--before=2026-01-15 12:00", "/mnt/b/home"], "/home", {
      id: "2",
      parent: "1",
      root: "/@home",
      path: "/home",
      device: "/dev/sda2",
      readonly: false,
    });
    for (const words of [
      "mount -o subvolid=5 '/dev/sda2' /mnt",
      "restore --replace '--before=2026-01-15 12:00' '/mnt/b/home' '/mnt/@home'",
      "umount '/home' && mount '/home'",
      "subvol=@home",
    ])
      expect(subvolume).toContain(words);
    const root = mountAdvice(["ssh://nas/b"], "/", {
      id: "2",
      parent: "1",
      root: "/@",
      path: "/",
      device: "/dev/vda1",
      readonly: false,
    });
    for (const words of ["restore --replace 'ssh://nas/b' '/mnt/@'", "reboot"])
      expect(root).toContain(words);
    const top = mountAdvice(["/b"], "/data", {
      id: "2",
      parent: "1",
      root: "/",
      path: "/data",
      device: "/dev/sdb",
      readonly: false,
    });
    for (const words of [
      "top level of /dev/sdb",
      "restore '/b' /mnt/restored",
      "btrfs subvolume set-default /mnt/restored",
    ])
      expect(top).toContain(words);
  });

  test("a mounted subvolume has its name, or the one that it had until it was replaced", () => {
    const device = "/dev/sda2";
    const before = "/@home.before-20260116-091500";
    const at = (root: string) => ({ root, device });
    const named = (paths: readonly string[]) => paths.map((path) => ({ path }));
    for (const [root, others, paths, expected] of [
      ["/@home", [], ["@home"], "/@home"],
      [before, [], ["@home", before.slice(1)], "/@home"],
      // Between the two renames.
      [before, [], ["@home.restoring-20260116-091500/tree"], "/@home"],
      [before, [], ["@home.restoring-20260116-091501/tree"], before],
      // Somebody looks at the old one, or has made it a subvolume of its own.
      [before, ["/@home"], ["@home", before.slice(1)], before],
      [before, [], [before.slice(1)], before],
      ["/.before-20260116-091500", [], [""], "/.before-20260116-091500"],
    ] as const)
      expect([root, replacedBy(at(root), others.map(at), named(paths))]).toEqual([root, expected]);
    expect(replacedBy(at(before), [{ root: "/@home", device: "/dev/sdb" }], named(["@home"]))).toBe(
      "/@home",
    );
    const unfinished = (path: string) => isUnfinished("/@/home", named([path]));
    expect(unfinished("@/home.restoring-20260116-091500/members")).toBe(true);
    for (const path of [
      "@/home.restoring-20260116-091500/tree",
      "@/home.restoring-photos/members",
      "@/home/x.restoring-20260116-091500/members",
      "home.restoring-20260116-091500/members",
    ])
      expect([path, unfinished(path)]).toEqual([path, false]);
  });

  test("how a replaced subvolume is mounted anew, and what would bring the old one back", () => {
    const mount = (path: string, root: string, device = "/dev/sda2") => ({
      id: "2",
      parent: "1",
      root,
      path,
      device,
      readonly: false,
    });
    const home = mount("/home dir", "/@home");
    const told = { kernel: "quiet", fstab: "", mounts: [home] };
    const fstab = (options: string) =>
      `#x /home\\040dir btrfs subvolid=9 0 0\nUUID=1\t/home\\040dir btrfs ${options} 0 0\n`;
    const by = (options: string) => planRemount(home, "/@home", { ...told, fstab: fstab(options) });
    expect(planRemount(home, "/@home", told).command).toBe(
      "umount '/home dir' && mount -o 'subvol=@home' '/dev/sda2' '/home dir'",
    );
    for (const options of ["subvol=@home,noatime", "defaults", "subvolid=5", "subvolid=0"])
      expect([options, by(options)]).toEqual([
        options,
        { command: "umount '/home dir' && mount '/home dir'", wrong: [], others: [] },
      ]);
    expect(by("noatime,subvolid=257,subvol=/@home").wrong).toEqual([
      "/etc/fstab has subvolid=257 for /home dir, which is the old one: write subvol=@home in its place",
    ]);
    const root = mount("/", "/@");
    const kernel = "ro rootflags=noatime,subvolid=256 quiet";
    const mounts = [root, home, mount("/srv", "/@/srv"), mount("/x", "/@", "/dev/sdb")];
    const rooted = planRemount(root, "/@", { kernel, fstab: "", mounts });
    expect([rooted.command, rooted.others]).toEqual(["reboot", ["/srv"]]);
    expect(rooted.wrong).toEqual([expect.stringContaining("rootflags with subvolid=256 for /")]);
    const below = { ...told, mounts: [home, mount("/home dir/disk", "/", "/dev/sdb")] };
    expect(planRemount(home, "/@home", below).command).toStartWith("umount -R '/home dir' && ");
  });

  test("what was copied on stays at a destination, and a pin that is gone claims nothing at the source", () => {
    const decisions = planDestination(
      [],
      { backups: [b1, b2, b3], copied: new Map([[b1.uuid, "/second"]]), chained: null },
      { policy: parsePolicy("1"), now: FAR },
    );
    expect(kept(decisions)).toBe("0301 0303");
    expect(reasonsOf(decisions, "0301")).toEqual(["shared with /second"]);
    const claimant = (uuid: string, unread: boolean): Claimant => ({
      id: "/b",
      pin: { uuid },
      unread,
      unsentPolicy: null,
    });
    expect(
      kept(
        planSource([s1, s2, s3], [claimant("gone", false)], { policy: parsePolicy("1"), now: FAR }),
      ),
    ).toBe("0303");
    expect(
      kept(
        planSource([s1, s2, s3], [claimant("gone", true)], { policy: parsePolicy("1"), now: FAR }),
      ),
    ).toBe("0301 0302 0303");
    expect(
      kept(
        planSource([s1, s2, s3], [claimant(s1.uuid, true)], { policy: parsePolicy("1"), now: FAR }),
      ),
    ).toBe("0301 0303");
  });
});

test("versions of a file: runs of snapshots in which it was the same", () => {
  const state = (size: string): FileState => ({
    type: "file",
    mode: "644",
    owner: "0:0",
    mtime: "1.000000000",
    size,
  });
  const seen = (text: string) =>
    text
      .split(" ")
      .filter(Boolean)
      .map((word, i) => ({
        name: `n${i}`,
        state: word[0] === "-" ? null : state(word[0] as string),
        columns: Array.from(word.slice(1), Number),
      }));
  const shown = (text: string) =>
    versionsAmong(seen(text)).map(
      ({ first, last, state: is, columns, names }) =>
        `${is?.size ?? "-"} ${first}..${last} ${names.length} ${[...columns].sort().join("")}`,
    );
  expect(shown("")).toEqual([]);
  expect(shown("-0 -01")).toEqual([]); // never there
  expect(shown("-0 10 101 21")).toEqual(["1 n1..n2 2 01", "2 n3..n3 1 1"]);
  expect(shown("10 -0 -0 10")).toEqual(["1 n0..n0 1 0", "- n1..n2 2 0", "1 n3..n3 1 0"]); // it came back
});

// ── Stored streams ───────────────────────────────────────────────────────────────────────

/** A UUID that can be read: `uuid("a")` is aaaaaaaa-…. */
const uuid = (letter: string) =>
  "8-4-4-4-12"
    .split("-")
    .map((n) => letter.repeat(Number(n)))
    .join("-");
const owner = { uuid: uuid("0"), place: "00000000", lineage: "aaaaaaaa" };
const noFilters = { level: "", recipients: [] };

/** "0301a" is the full stream of the snapshot 0301 with the UUID a, "0302b<a" the difference to a; with "!" it has no checksum object. */
function files(text: string, from = owner): StoredFile[] {
  return text
    .split(" ")
    .filter(Boolean)
    .flatMap((word) => {
      const [, day = "", a = "", parent, unsummed] = /^(\d{4})(\w)(?:<(\w))?(!?)$/.exec(word) ?? [];
      const snapshot = snap(day, { uuid: uuid(a) });
      const name = streamName(
        { snapshot, parent: parent === undefined ? null : snap("0101", { uuid: uuid(parent) }) },
        from,
        noFilters,
      );
      return [{ name, bytes: 1000 }, ...(unsummed ? [] : [{ name: `${name}.sha256`, bytes: 100 }])];
    });
}
const wholeOf = (listed: readonly StoredFile[], atomic = false) =>
  parseStreams(listed, atomic)
    .streams.filter(isComplete)
    .map(({ receivedUuid }) => receivedUuid?.[0])
    .join("");
/** The streams as backups, oldest first. */
const backupsIn = (listed: readonly StoredFile[]) =>
  snapshotsAmong(parseStreams(listed, false).streams.filter(isComplete), "", null) as (Backup &
    Stream)[];
const letters = (some: readonly { receivedUuid: string | null }[]) =>
  some.map(({ receivedUuid }) => receivedUuid?.[0]).join("");

describe("the name of a stored stream", () => {
  const local = (offset: number) => ({ moment: at("0301") - offset * 60e3 });
  test.each([
    [
      "full, in Central Europe",
      snap("0301", { uuid: uuid("a"), ...local(60) }),
      null,
      noFilters,
      `20240301-000000+0100_00000000_aaaaaaaa_${uuid("0")}_${uuid("a")}_full.btrfs`,
    ],
    [
      "incremental, in Newfoundland, with filters",
      snap("0301", { uuid: uuid("a"), ...local(-210) }),
      snap("0201", { uuid: uuid("b") }),
      { level: "3", recipients: ["x"] },
      `20240301-000000-0330_00000000_aaaaaaaa_${uuid("0")}_${uuid("a")}_${uuid("b")}.btrfs.zst.gpg`,
    ],
    [
      "of a received snapshot and parent, as the stream calls them",
      snap("0301", { uuid: uuid("a"), receivedUuid: uuid("c") }),
      snap("0201", { uuid: uuid("b"), receivedUuid: uuid("d") }),
      noFilters,
      `20240301-000000+0000_00000000_aaaaaaaa_${uuid("0")}_${uuid("c")}_${uuid("d")}.btrfs`,
    ],
  ])("%s", (_, snapshot, parent, filters, name) => {
    expect(streamName({ snapshot, parent }, owner, filters)).toBe(name);
    const [stream] = parseStreams([{ name, bytes: 7 }], true).streams;
    expect(stream).toMatchObject({
      name: snapshot.name,
      moment: snapshot.moment,
      bytes: 7,
      owner,
      receivedUuid: snapshot.receivedUuid ?? snapshot.uuid,
      from: parent && (parent.receivedUuid ?? parent.uuid),
      compressed: filters.level !== "",
      encrypted: filters.recipients.length > 0,
    });
  });
  test("a prefix may hold anything but slashes and line breaks", () => {
    for (const prefix of ["", "a b_", "20240301-000000+0100_", "ü*?[$(x)", ".-"]) {
      const snapshot = snap("0301", { name: named(`${prefix}20240301-000000`), uuid: uuid("a") });
      const name = streamName({ snapshot, parent: null }, owner, noFilters);
      expect(parseStreams([{ name, bytes: 1 }], true).streams).toMatchObject([
        { name: snapshot.name, receivedUuid: uuid("a") },
      ]);
    }
  });
  test("the longest prefix leaves room for what is put around a name", () => {
    const name = streamName(
      {
        snapshot: snap("0301", {
          name: named(`${"p".repeat(70)}20240301-000000`),
          uuid: uuid("a"),
        }),
        parent: snap("0201", { uuid: uuid("b") }),
      },
      owner,
      { level: "3", recipients: ["x"] },
    );
    expect(`.${name}.sha256.part`.length).toBeLessThanOrEqual(255);
  });
  test.each([
    "",
    "x",
    "20240301-000000",
    "20240230-000000+0000_00000000_aaaaaaaa_0_0_full.btrfs",
    `20240301-000000+0000_00000000_aaaaaaaa_${uuid("0")}_${uuid("a")}_full.btrfs.part`,
    `20240301-000000+0000_00000000_aaaaaaaa_${uuid("0")}_${uuid("a")}_full.btrfs.gpg.zst`,
  ])("%j is foreign", (name) => {
    expect(parseStreams([{ name, bytes: 1 }], true)).toMatchObject({ streams: [], unsummed: [] });
    expect(parseStreams([{ name, bytes: 1 }], true).debris.size).toBe(0);
  });
  test("an owner without a UUID of its own gets one", () => {
    expect(ownerOf({ uuid: "fs/top", host: "h", path: "/p" })).toEqual({
      uuid: expect.stringMatching(/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/),
      place: expect.stringMatching(/^[0-9a-f]{8}$/),
      lineage: expect.stringMatching(/^[0-9a-f]{8}$/),
    });
    expect(ownerOf({ uuid: uuid("a"), host: "h", path: "/p" }).uuid).toBe(uuid("a"));
    expect(ownerOf({ uuid: uuid("a"), host: "h", path: "/p" }).place).not.toBe(
      ownerOf({ uuid: uuid("a"), host: "h2", path: "/p" }).place,
    );
  });
});

describe("what a store holds", () => {
  test.each([
    ["a chain", "0301a 0302b<a 0303c<b", "abc"],
    ["two chains", "0301a 0302b<a 0303c 0304d<c", "abcd"],
    ["without its full stream nothing of a chain is whole", "0302b<a 0303c<b 0304d 0305e<d", "de"],
    ["without one in the middle, what stands on it is not", "0301a 0302b<a 0304d<c 0305e<d", "ab"],
    [
      "an upload under way is not whole, and neither is what stands on it",
      "0301a 0302b<a! 0303c<b",
      "a",
    ],
    [
      "the same data twice: one is enough for what stands on it",
      "0301a 0302b<a 0302b 0303c<b",
      "abbc",
    ],
    ["of the same data twice, one incomplete", "0301a! 0301a<x 0302b<a", ""],
    ["streams that stand on each other are not whole", "0301a<b 0302b<a", ""],
    ["a stream that stands on itself is not whole", "0301a<a", ""],
    ["nothing", "", ""],
  ])("%s", (_, text, expected) => expect(wholeOf(files(text))).toBe(expected));
  test("where half a stream cannot be, none needs a checksum object", () =>
    expect(wholeOf(files("0301a! 0302b<a!"), true)).toBe("ab"));
  test("streams are in the order of their moments, not of their names", () => {
    const [first, second] = [
      snap("1027-0230", { uuid: uuid("a"), moment: at("1027-0030") }),
      snap("1027-0215", { uuid: uuid("b"), moment: at("1027-0115") }),
    ];
    const listed = [
      { name: streamName({ snapshot: second, parent: first }, owner, noFilters), bytes: 1 },
      { name: streamName({ snapshot: first, parent: null }, owner, noFilters), bytes: 1 },
    ];
    expect(letters(snapshotsAmong(parseStreams(listed, true).streams, "", null))).toBe("ab");
  });

  const debrisOf = (listed: readonly StoredFile[], atomic = false) =>
    [...parseStreams(listed, atomic).debris.values()]
      .flat()
      .map((name) =>
        name
          .replace(/_.*_(\w)[\w-]*_(full|\w)[\w-]*\.btrfs/, ":$1:$2")
          .replace(/20240|000000|[-+]/g, ""),
      )
      .join(" ");
  const only = (part: (name: string) => string) =>
    files("0301a!").map(({ name, bytes }) => ({ name: part(name), bytes }));
  test.each([
    ["nothing of what is whole", files("0301a 0302b<a"), false, ""],
    ["one upload without a checksum object", files("0301a 0302b<a!"), false, "3020000:b:a"],
    ["not where it is complete without", files("0301a 0302b<a!"), true, ""],
    ["not what others stand on: its checksum got lost", files("0301a! 0302b<a"), false, ""],
    ["not several: their checksums got lost", files("0301a 0302b<a! 0303c<b!"), false, ""],
    ["a temporary file", only((name) => `.${name}.part`), true, ".3010000:a:full.part"],
    [
      "a temporary checksum",
      only((name) => `.${name}.sha256.part`),
      true,
      ".3010000:a:full.sha256.part",
    ],
    [
      "a checksum without its stream",
      only((name) => `${name}.sha256`),
      true,
      "3010000:a:full.sha256",
    ],
    [
      "nothing foreign",
      [
        { name: ".x.part", bytes: 1 },
        { name: "x.sha256", bytes: 1 },
        { name: ".20240301-000000.part", bytes: 1 },
      ],
      true,
      "",
    ],
  ])("debris: %s", (_, listed, atomic, expected) =>
    expect(debrisOf(listed as StoredFile[], atomic as boolean)).toBe(expected as string),
  );
  test("what got lost is named", () =>
    expect(letters(parseStreams(files("0301a! 0302b<a 0303c<b!"), false).unsummed)).toBe("ac"));
  test("one upload a prefix can be debris", () => {
    const other = files("0301a!").map(({ name, bytes }) => ({ name: `p${name}`, bytes }));
    expect(parseStreams([...files("0301a!"), ...other], false)).toMatchObject({ unsummed: [] });
  });
  test("checksum objects, by whatever program", () => {
    const sum = "a1".repeat(32);
    expect([...parseSums(`${sum}  x y\n# 17 bytes\n${sum} *z\nnonsense\n`)]).toEqual([
      ["x y", sum],
      ["z", sum],
    ]);
  });
});

describe("retention of chains", () => {
  const chain = "0301a 0302b<a 0303c<b 0304d 0305e<d 0306f<e";
  const kept = (text: string, policy: string) => {
    const backups = backupsIn(files(text));
    return letters(
      planDestination(
        [],
        { backups, copied: new Map(), chained: [] },
        { policy: parsePolicy(policy), now: FAR },
      )
        .filter(({ reasons }) => reasons.length > 0)
        .map(({ entry }) => entry),
    );
  };
  test.each([
    ["all of the newest chain", "1", "def"],
    ["a chain goes when nothing needs it", "3", "def"],
    ["a chain stays as far as something needs it", "4", "abcdef"],
    ["everything", "0", "abcdef"],
    ["the middle of a chain needs its beginning", "1 2d+", "def"],
  ])("%s", (_, policy, expected) => expect(kept(chain, policy)).toBe(expected));
  test("what a branch needs stays, its siblings go", () =>
    expect(kept("0301a 0302b<a 0303c<a 0304d<c", "1")).toBe("acd"));
  test("the reason tells who needs it", () => {
    const backups = backupsIn(files("0301a 0302b<a"));
    expect(
      planDestination(
        [],
        { backups, copied: new Map(), chained: [] },
        { policy: parsePolicy("1"), now: FAR },
      )[0]?.reasons,
    ).toEqual(["needed by 20240302-000000"]);
  });
  test("what is needed for the pin stays", () => {
    const backups = backupsIn(files(chain));
    const decisions = planDestination(
      [snap("0302", { uuid: uuid("b") })],
      { backups, copied: new Map(), chained: [] },
      { policy: parsePolicy("1"), now: FAR },
    );
    expect(
      letters(decisions.filter(({ reasons }) => reasons.length > 0).map(({ entry }) => entry)),
    ).toBe("abdef");
  });
  test("what a stream of another source stands on stays", () => {
    const backups = backupsIn(files(chain));
    const [other] = backupsIn(
      files("0301a 0302b<a 0303c<b 0304d 0305e<d 0306f<e 0307a<b", {
        uuid: uuid("1"),
        place: "11111111",
        lineage: "bbbbbbbb",
      }),
    ).slice(-1) as [Backup & Stream];
    const theirs = { ...other, parentUuid: backups[1]?.uuid as string };
    const decisions = planDestination(
      [],
      { backups, copied: new Map(), chained: [theirs] },
      { policy: parsePolicy("1"), now: FAR },
    );
    expect(
      letters(decisions.filter(({ reasons }) => reasons.length > 0).map(({ entry }) => entry)),
    ).toBe("abdef");
  });
  test("each goes before what it stands on", () => {
    const all = backupsIn(files("0301a 0302b<a 0303c<b 0304d<c 0305e<b"));
    expect(letters(deletionOrder(all, { chained: [] }))).toMatch(/^d.*c.*b.*a$/);
    expect(deletionOrder(all, { chained: null })).toEqual(all);
  });
  test("room is made of dead chains only, never of what the newest or the next one needs", () => {
    const backups = backupsIn(files(chain));
    const here = [snap("0306", { uuid: uuid("f") }), snap("0307", { uuid: uuid("1") })] as const;
    const coming = [{ snapshot: here[1], parent: here[0] }];
    expect(
      letters(
        planRoom(here, { backups, copied: new Map(), chained: [] }, coming, {
          policy: parsePolicy("1"),
          now: FAR,
        }),
      ),
    ).toBe("abc");
    expect(
      letters(
        planRoom(
          here,
          { backups, copied: new Map(), chained: [] },
          [{ snapshot: here[1], parent: null }],
          { policy: parsePolicy("1"), now: FAR },
        ),
      ),
    ).toBe("abc");
  });

  // Any listing, any policy, and an interruption after any deletion.
  const soakRuns = Number(process.env["SOAK"] ?? 300);
  test("however it is interrupted, nothing that is kept ever lacks an ancestor", () => {
    fc.assert(
      fc.property(
        fc.array(fc.tuple(fc.nat(8), fc.boolean()), { minLength: 1, maxLength: 16 }),
        fc.constantFrom("1", "2", "3", "5", "2d 2w", "1 3d+", "*m"),
        fc.array(fc.nat(15), { maxLength: 3 }),
        (steps, policy, missing) => {
          const letterOf = (i: number) => i.toString(16);
          const words = steps.map(
            ([back, full], i) =>
              `03${String(i + 1).padStart(2, "0")}${letterOf(i)}${full || i === 0 ? "" : `<${letterOf(Math.max(0, i - 1 - back))}`}`,
          );
          const listed = files(words.filter((_, i) => !missing.includes(i)).join(" "));
          const backups = backupsIn(listed);
          const decisions = planDestination(
            [],
            { backups, copied: new Map(), chained: [] },
            { policy: parsePolicy(policy), now: FAR },
          );
          const stays = decisions
            .filter(({ reasons }) => reasons.length > 0)
            .map(({ entry }) => entry.uuid);
          const going = deletionOrder(
            decisions.filter(({ reasons }) => reasons.length === 0).map(({ entry }) => entry),
            { chained: [] },
          );
          let left = listed;
          for (const gone of [undefined, ...going]) {
            for (const object of gone === undefined ? [] : [gone.uuid, `${gone.uuid}.sha256`]) {
              left = left.filter(({ name }) => name !== object);
              const whole = new Set(
                parseStreams(left, false)
                  .streams.filter(isComplete)
                  .map(({ uuid }) => uuid),
              );
              for (const one of stays)
                if (!whole.has(one))
                  throw new Error(`${one} was kept, and cannot be restored after ${object}`);
            }
            // What is not deleted yet is still whole as well: the next run can go on.
            expect(
              parseStreams(left, false).streams.filter(
                (stream) => stream.stored && !stream.readonly,
              ).length,
            ).toBe(
              parseStreams(listed, false).streams.filter(
                (stream) => stream.stored && !stream.readonly,
              ).length,
            );
          }
          expect(letters(backupsIn(left))).toBe(
            letters(backups.filter(({ uuid }) => stays.includes(uuid))),
          );
        },
      ),
      {
        numRuns: soakRuns,
        ...(process.env["SEED"] === undefined ? {} : { seed: Number(process.env["SEED"]) }),
      },
    );
  });
});

describe("when a chain ends", () => {
  const s = ["0301", "0302", "0303", "0304", "0305", "0306"].map((day, i) =>
    snap(day, { uuid: uuid("abcdef"[i] as string) }),
  );
  const fulls = (stored: string, every: string, upTo = 6) => {
    const held = backupsIn(files(stored));
    const place: Standing = {
      held,
      backups: held,
      copied: new Map(),
      obstacles: new Map(),
      chained: [],
    };
    return planTransfers(s.slice(0, upTo), place, {
      policy: null,
      backfill: true,
      incremental: true,
      newestOnly: false,
      now: FAR,
      fullEvery: parseFullEvery(every),
    })
      .transfers.map(
        ({ snapshot, parent }) =>
          `${snapshot.uuid[0]}${parent === null ? "" : `<${parent.uuid[0]}`}`,
      )
      .join(" ");
  };
  test.each([
    ["after so many streams, all new", "", "3", "a b<a c<b d e<d f<e"],
    ["after so many streams, going on", "0301a 0302b<a", "3", "c<b d e<d f<e"],
    ["at once, if it is longer already", "0301a 0302b<a 0303c<b 0304d<c", "2", "e f<e"],
    ["every one", "0301a", "1", "b c d e f"],
    ["never", "", "0", "a b<a c<b d<c e<d f<e"],
    ["after a time", "", "2d", "a b<a c d<c e f<e"],
    ["after a time, going on", "0301a 0302b<a", "3d", "c<b d e<d f<e"],
    [
      "what is missing in between continues the chain that it branches from",
      "0301a 0302b<a 0304d<b",
      "3",
      "c<b e f<e",
    ],
  ])("%s", (_, stored, every, expected) => expect(fulls(stored, every)).toBe(expected));
  test.each(["", "x", "-1", "0d", "3x", "1.5", "30 d"])("%j is no --full-every", (text) =>
    expect(() => parseFullEvery(text)).toThrow(UsageError),
  );
  test("a re-created snapshot of the same name is not the parent", () => {
    const again = snap("0301", { uuid: uuid("9") });
    const held = backupsIn(files("0301a"));
    const { transfers } = planTransfers(
      [again, s[1] as Snapshot],
      { held, backups: held, copied: new Map(), obstacles: new Map(), chained: [] },
      {
        policy: null,
        incremental: true,
        newestOnly: false,
        now: FAR,
        fullEvery: parseFullEvery("30"),
      },
    );
    expect(transfers.map(({ snapshot, parent }) => [snapshot.uuid[0], parent?.uuid[0]])).toEqual([
      ["9", undefined],
      ["b", "9"],
    ]);
  });
});

describe("whose streams are", () => {
  const of = (n: string, lineage: string) => ({
    uuid: uuid(n),
    place: `0000000${n}`,
    lineage: lineage.repeat(8),
  });
  const me = of("0", "a");
  const own = (listed: readonly StoredFile[], snapshots: readonly Snapshot[]) =>
    [...lineagesOf(parseStreams(listed, false).streams, me, snapshots)]
      .map((one) => one[0])
      .sort()
      .join("");
  test.each([
    ["its own", files("0301a", me), [], "a"],
    [
      "those that it shares data with: it was restored",
      files("0301a 0302b<a", of("1", "b")),
      [snap("0302", { uuid: uuid("7"), receivedUuid: uuid("b") })],
      "ab",
    ],
    [
      "those that it went on with, also when nothing is shared any more",
      [...files("0301a", of("1", "b")), ...files("0302b", of("0", "b"))],
      [],
      "ab",
    ],
    ["not another's", [...files("0301a", of("2", "c")), ...files("0302b", me)], [], "a"],
    ["not by name", files("0301a", of("2", "c")), [snap("0301", { uuid: uuid("b") })], "a"],
  ])("%s", (_, listed, snapshots, expected) => expect(own(listed, snapshots)).toBe(expected));
});

describe("the pieces of a restore", () => {
  const { streams } = parseStreams(files("0301a 0302b<a 0303c<b"), false);
  const chain = chainOf(
    streams[2] as Stream,
    new Map(streams.map((stream) => [stream.uuid, stream])),
  );
  test.each([
    ["all", [], "abc"],
    ["after what is there", [{ uuid: "x", receivedUuid: uuid("b") }], "c"],
    ["after what is there as itself", [{ uuid: uuid("a"), receivedUuid: null }], "bc"],
    ["the chosen one in any case", [{ uuid: uuid("c"), receivedUuid: null }], "abc"],
    ["all, if what is there is something else", [{ uuid: "y", receivedUuid: "z" }], "abc"],
  ])("%s", (_, there, expected) =>
    expect(
      letters(
        planPieces(
          chain,
          there.map((one) => ({ ...snap("0101"), ...one })),
        ),
      ),
    ).toBe(expected),
  );
});

test("streams are received beside something only where they leave half of what is free, and stop where a tenth is left", () => {
  for (const [bytes, free, fits] of [
    [0, 0, true],
    [100, 300, true],
    [100, 299, false],
    [1, 1e12, true],
  ] as const)
    expect([bytes, free, fitsBeside(bytes, free)]).toEqual([bytes, free, fits]);
  expect([isNearlyFull(99, 1000), isNearlyFull(100, 1000)]).toEqual([true, false]);
});

test("a drill compares with what the backup was made of, else with another copy, never with itself or with what is not whole", () => {
  const one = (uuid: string, receivedUuid: string | null, more = {}) => ({
    ...snap("0101"),
    uuid,
    receivedUuid,
    ...more,
  });
  const backup = one("backup", "origin");
  const [copy, origin] = [one("copy", "origin"), one("origin", null)];
  for (const [subvolumes, found] of [
    [[backup], undefined],
    [[backup, copy, origin], "origin"],
    [[backup, copy], "copy"],
    [[one("origin", null, { readonly: false })], undefined],
    [
      [one("copy", "origin", { path: ".btrfs-backup-scratch.restoring-20260101-000000/x" })],
      undefined,
    ],
  ] as const)
    expect(sameDataAmong(backup, subvolumes)?.uuid).toBe(found as string);
});

describe("parts of an object in S3", () => {
  const [mib, gib, tib] = [2 ** 20, 2 ** 30, 2 ** 40];
  test.each([
    [0, 16 * mib],
    [48 * gib, 16 * mib],
    [140 * gib, 16 * mib],
  ])("%d bytes in parts of 16 MiB", (bytes, part) => expect(partSize(bytes)).toBe(part));
  test("any size fits into 10,000 parts, with something to spare, and takes no more memory than that", () => {
    for (const bytes of [150 * gib, 160 * gib, 300 * gib, 305 * gib, 312 * gib, tib, 5 * tib]) {
      expect(partSize(bytes) * 10_000).toBeGreaterThan(bytes * 1.04);
      expect(partSize(bytes)).toBeLessThan(Math.max(17 * mib, (bytes / 10_000) * 1.06 + mib));
    }
  });
  test("what no object can hold is refused", () =>
    expect(() => partSize(5.1 * tib)).toThrow("5.0T"));
  test("what has no block of its own needs no space, and what compresses is seen", () => {
    const text = "  1 subvol\n  2  len=4096\n 3  len=2000\n  1 set_xattr\n  1 compressing\n";
    expect(parseEstimate(text)).toEqual({ bytes: 14792, data: 8192, compressing: true });
    expect(parseEstimate("1 snapshot\n\n")).toEqual({ bytes: 200, data: 0, compressing: false });
  });

  test("an estimate adds up data, and something for each command", () => {
    expect(
      parseEstimate(
        "      3 chown\n      2  len=1000\n      1  len=48\n      1 snapshot\n      2 update_extent\n",
      ).bytes,
    ).toBe(2048 + 6 * 200);
    for (const unknown of ["", "3 chown\n", "1 subvol\nsomething else\n"])
      expect(() => parseEstimate(unknown)).toThrow("something unknown");
  });
});

describe("when a clock showed a time", () => {
  const inZone = <T>(zone: string, work: () => T): T => {
    const before = process.env["TZ"];
    process.env["TZ"] = zone;
    try {
      return work();
    } finally {
      if (before === undefined) delete process.env["TZ"];
      else process.env["TZ"] = before;
    }
  };
  const utc = (moment: number) => new Date(moment).toISOString().slice(5, 16);
  test.each([
    ["winter", "Europe/Berlin", "20261201-1200", -Infinity, "12-01T11:00"],
    ["summer", "Europe/Berlin", "20260701-1200", -Infinity, "07-01T10:00"],
    [
      "an hour that comes twice: the first",
      "Europe/Berlin",
      "20261025-0230",
      -Infinity,
      "10-25T00:30",
    ],
    [
      "an hour that comes twice: the second, once it has gone back",
      "Europe/Berlin",
      "20261025-0230",
      Date.UTC(2026, 9, 25, 0, 45),
      "10-25T01:30",
    ],
    [
      "half an hour that comes twice",
      "Australia/Lord_Howe",
      "20260405-0145",
      Date.UTC(2026, 3, 4, 15, 0),
      "04-04T15:15",
    ],
    [
      "a time that was before, for whatever reason",
      "Europe/Berlin",
      "20260701-1200",
      Date.UTC(2026, 6, 2),
      "07-01T10:00",
    ],
  ])("%s", (_, zone, time, earliest, expected) =>
    expect(inZone(zone, () => utc(momentOf(at(time), earliest)))).toBe(expected),
  );
  test("the source's order tells which of two equal hours it was", () => {
    const [first, second, third] = [
      snap("20261025-0230"),
      snap("20261025-0215"),
      snap("20261025-0310"),
    ];
    const entries = [first, second, third].map(({ time: _, ...entry }) => ({
      ...entry,
      moment: null,
    }));
    expect(
      inZone("Europe/Berlin", () =>
        snapshotsAmong(entries, "", "source").map(({ moment }) => utc(moment)),
      ),
    ).toEqual(["10-25T00:30", "10-25T01:15", "10-25T02:10"]);
  });
});

describe("what a check says", () => {
  const DAY = 86400e3;
  test.each([
    ["100 days at the rate", 100 << 20, { bytes: 1 << 20, span: DAY }, false, "for 3 months at"],
    ["13 days", 13 << 20, { bytes: 1 << 20, span: DAY }, true, "for 13 days at"],
    ["an empty difference", 1 << 20, { bytes: 0, span: DAY }, false, "for 2872 years at"],
    ["nothing is free", 0, { bytes: 1, span: DAY }, true, "0B are free, for 0 seconds"],
    ["no difference yet", 0, null, false, "there is no difference yet"],
  ])("of free space: %s", (_, free, rate, short, words) => {
    const said = lasting(free, rate);
    expect(said.short).toBe(short);
    expect(said.message).toContain(words);
  });

  test.each([
    ["zstd not found: install zstd", "/b", "apt install zstd"],
    [
      "nas: zstd not found: install zstd",
      "ssh://root@nas:22/b",
      "ssh -p 22 root@nas apt install zstd",
    ],
    ['x; "btrfs-backup unpin --all /home" moves it', "/b", "btrfs-backup unpin --all /home"],
    ["no such directory: /x (is the disk mounted? mkdir -p /x)", "/x/y", "mkdir -p /x"],
    ["not on btrfs (is the disk mounted?)", "/a b", "mount '/a b'"],
    ["not on btrfs (is the disk mounted?)", "raw+ssh://nas/b", "ssh nas mount /b"],
    ["others can change /d, and could lead us", "/d/b", "chown root /d && chmod go-w /d"],
    ["20260101-000000 is not sent: x", "/b", "mv /b/20260101-000000 /b/20260101-000000.other"],
    ["the backups there belong to x", "/b", "btrfs-backup --adopt /home /b"],
    ["sending needs root: use --sudo", "/b", "sudo btrfs-backup check /home /b"],
    ["root@nas: Permission denied (publickey)", "ssh://root@nas/b", "ssh root@nas true"],
    ["connect to host nas: Connection refused", "ssh://nas/b", "ssh nas true"],
    ["something else", "/b", "btrfs-backup --dry-run /home /b"],
    ["something else", "rclone:s3:b", "btrfs-backup --dry-run /home rclone://s3:b"],
  ])("mends %s at %s", (message, place, mend) => {
    const location = parseLocation(place);
    expect(mendFor(message, { level: "fail", source: "/home", location })).toBe(mend);
  });
  test.each([
    'ssh: "btrfs-backup list; rm -rf /"',
    'ssh: "btrfs-backup list $(reboot)"',
    "no such directory: /b (if it is to be made: mkdir -p /b; reboot)",
    "no such directory: /b (if it is to be made: mkdir -p /b | sh)",
  ])("another host's words do not become a command to copy: %j", (message) => {
    const location = parseLocation("ssh://nas/b");
    expect(mendFor(message, { level: "warn", source: "/home", location })).toBeNull();
  });
  test("a warning that no command mends has none", () =>
    expect(
      mendFor("x", { level: "warn", source: "/home", location: parseLocation("/b") }),
    ).toBeNull());

  test("tools by their versions", () =>
    expect(
      parseTools(
        "Linux 6.18.1-amd64\nbtrfs btrfs-progs v6.2\nzstd *** zstd command line interface 64-bits v1.5.4, by Yann Collet ***\nflock flock from util-linux 2.38.1\nrclone\n",
      ),
    ).toEqual([
      "Linux 6.18.1-amd64",
      "btrfs 6.2",
      "zstd 1.5.4",
      "flock 2.38.1",
      "rclone (of an unknown version)",
    ]));

  test("timers, services and files of cron", () => {
    expect(parseTimers("\ncron\n")).toEqual({ timers: [], failed: [], files: [] });
    const units =
      "Id=btrfs-backup@a.timer\nActiveState=active\nLastTriggerUSec=Thu 2026-11-26 00:00:01 UTC\nResult=success\n\nId=btrfs-backup@b.timer\nActiveState=inactive\nLastTriggerUSec=n/a\nResult=success\n\nId=btrfs-backup@a.service\nActiveState=inactive\nResult=success\n\nId=btrfs-backup@b.service\nActiveState=failed\nResult=exit-code\n";
    expect(parseTimers(`${units}\ncron\n/etc/cron.d/x\n`)).toEqual({
      timers: [
        { unit: "btrfs-backup@a.timer", last: "Thu 2026-11-26 00:00:01 UTC", isActive: true },
        { unit: "btrfs-backup@b.timer", last: "", isActive: false },
      ],
      failed: ["btrfs-backup@b.service"],
      files: ["/etc/cron.d/x"],
    });
  });

  test("a timer of one argument file beside the one for all of them would run it twice", () => {
    const timer = (unit: string, isActive: boolean) => ({ unit, isActive, last: "" });
    const [a, b] = [timer("btrfs-backup@a.timer", true), timer("btrfs-backup@b.timer", false)];
    expect(timersTwice([a, b])).toEqual([]);
    expect(timersTwice([a, b, timer("btrfs-backup.timer", false)])).toEqual([]);
    expect(timersTwice([timer("btrfs-backup.timer", true), a, b])).toEqual([
      "btrfs-backup@a.timer",
    ]);
  });
});

describe("setup", () => {
  const folder = (text: string) => parseLocation(text) as Parameters<typeof setupName>[0];
  test.each([
    ["/", "root"],
    ["/home", "home"],
    ["/var/lib/x", "var-lib-x"],
    ["/mnt/@home", "mnt-@home"],
    ["/-odd", "-odd"],
    ["ssh://root@nas:22/home", "nas-home"],
    ["ssh://nas/", "nas"],
    // What systemd does not take, or what would be taken for another one, gets a digest.
    ["/root", "root-5e2b3ac7"],
    ["/my data", "my_data-5e2b3ac7"],
    ["/.hidden", "_hidden-5e2b3ac7"],
    ["/ü%\\", "___-5e2b3ac7"],
  ])("the argument file of %s is %s", (path, name) => {
    const digest = /-[0-9a-f]{8}$/;
    const made = setupName(folder(path));
    expect([made.replace(digest, ""), digest.test(made)]).toEqual([
      name.replace(digest, ""),
      digest.test(name),
    ]);
    expect(made).toMatch(/^[\w:@-][\w.:@-]*$/);
  });

  test("names that systemd could not tell apart differ", () => {
    const paths = [
      "/",
      "/root",
      "/a b",
      "/a_b",
      "/a+b",
      `/${"x".repeat(200)}1`,
      `/${"x".repeat(200)}2`,
    ];
    const names = paths.map((path) => setupName(folder(path)));
    expect(new Set(names).size).toBe(paths.length);
    for (const name of names) expect(name.length).toBeLessThan(170);
  });

  const table = [
    { path: "/", options: ["defaults"] },
    { path: "/backup", options: ["noatime"] },
    { path: "/mnt/usb", options: ["noauto", "noatime"] },
    { path: "/mnt/late/", options: ["nofail"] },
  ];
  test.each([
    ["/", "/dev/sdb1", null],
    ["/backup", "/dev/sda2", null],
    ["/backup", "/dev/sdb1", "/dev/sdb1 is a removable disk"],
    ["/mnt/usb", "/dev/sda3", '/mnt/usb is mounted with "noauto"'],
    ["/mnt/late", "/dev/sda3", '/mnt/late is mounted with "nofail"'],
    [
      "/media/me/disk",
      "/dev/sda4",
      "/media/me/disk is not in /etc/fstab, so nothing mounts it at boot",
    ],
  ])("the disk at %s (%s) can be away: %s", (path, device, why) => {
    expect(whyAway({ path, device }, { table, removable: new Set(["/dev/sdb1"]) })).toBe(why);
  });

  const facts: SetupFacts = {
    away: new Map(),
    surplus: 0,
    systemd: true,
    units: true,
    forAll: false,
    exporter: null,
    program: "/usr/local/sbin/btrfs-backup",
  };
  const propose = (
    places: readonly string[],
    {
      options = [],
      directory = null,
      ...more
    }: Partial<SetupFacts> & {
      options?: [string, string | null][];
      directory?: string | null;
    } = {},
  ) => {
    const [source, ...destinations] = places.map(parseLocation);
    const wanted = { source: source as never, destinations, options, directory };
    return proposalFor(wanted, { ...facts, ...more });
  };
  const kept = ["-N", "7d", "-n", "14d 8w 12m", "--wait", "3600"];
  test.each([
    ["a place", propose(["/home", "/backup/home"]), ["/home", "/backup/home", ...kept]],
    [
      "one that can be away",
      propose(["/home", "/mnt/usb/x", "ssh://nas/b"], { away: new Map([["/mnt/usb/x", "why"]]) }),
      ["/home", "ssh://nas/b", "--optional", "/mnt/usb/x", "--max-age", "14d", ...kept],
    ],
    [
      "a command, which keeps what it likes",
      propose(["/home", "shell://cat >/dev/null"]),
      ["/home", "shell://cat >/dev/null", "-N", "7d", "--wait", "3600"],
    ],
    [
      "Prometheus, and options",
      propose(["/", "/backup/r"], {
        exporter: "/var/lib/e",
        options: [
          ["snapshot-prefix", "a b-"],
          ["sudo", null],
          ["snapshot-folder", "-x"],
        ],
      }),
      ["/", "/backup/r", ...kept].concat(
        ["--metrics", "/var/lib/e/btrfs-backup-root.prom"],
        ["--snapshot-prefix", "a b-", "--sudo", "--snapshot-folder=-x"],
      ),
    ],
    [
      "more than would be kept",
      propose(["/home", "/backup/home"], { surplus: 3 }),
      ["/home", "/backup/home", "--wait", "3600"],
    ],
    ["blanks at the end", propose(["/home ", "/b "]), ["/home /", "/b /", ...kept]],
  ])(
    "the arguments for %s are these, and a file gives them back",
    (_, { lines, words }, expected) => {
      expect(words).toEqual(expected);
      expect(expandFiles(["@x"], () => lines.join("\n"))).toEqual(expected);
    },
  );

  test.each<[string, Parameters<typeof propose>[1], string[]]>([
    ["systemd", {}, ["systemctl enable --now btrfs-backup@home.timer"]],
    [
      "one timer for all",
      { forAll: true, units: false },
      ["systemctl enable --now btrfs-backup.timer\n", "journalctl -u btrfs-backup.service\n"],
    ],
    [
      "no unit files",
      { units: false },
      ["First: the unit files", "enable --now btrfs-backup@home"],
    ],
    [
      "no systemd",
      { systemd: false },
      [
        "17 3 * * * root ionice -c 3 /usr/local/sbin/btrfs-backup --quiet @/etc/btrfs-backup/home.args",
      ],
    ],
    [
      "a directory of its own, whose percent signs would end a line of cron",
      { directory: "/my 10%" },
      [
        "--quiet '@/my 10\\%/home.args'",
        "btrfs-backup setup --yes --config-dir '/my 10%' /home /backup/home",
        "btrfs-backup '@/my 10%/home.args'",
      ],
    ],
  ])("with %s, the proposal says how it is started", (_, given, told) => {
    const text = proposalText(propose(["/home", "/backup/home"], given));
    for (const one of [
      ...told,
      "btrfs-backup list /home\n",
      "restore /backup/home /home.restored\n",
    ])
      expect(text).toContain(one);
  });

  test("a survey is read", () => {
    const mounts = [
      "22 1 0:20 /@ / rw - btrfs /dev/sda2 rw",
      "23 22 0:21 / /mnt/my\\040disk rw - btrfs /dev/sdb1 rw",
      "24 22 8:1 / /boot rw - ext4 /dev/sda1 rw",
    ];
    const text = `N mounts\n${mounts.join("\n")}\nN fstab\n# x\nUUID=1 / btrfs subvol=@ 0 0\nUUID=2 /mnt/my\\040disk btrfs noauto,ro\nN removable\n/dev/sdb1\nN places\n/mnt/my disk\nN systemd\nyes\nN units\n/etc/systemd/system/btrfs-backup@.timer\n/usr/lib/systemd/system/btrfs-backup@.timer\nN exporter\nN program\nN end\n`;
    const read = parseSurvey({ nonce: "N", text });
    expect(read).toMatchObject({
      places: ["/mnt/my disk"],
      table: [
        { path: "/", options: ["subvol=@"] },
        { path: "/mnt/my disk", options: ["noauto", "ro"] },
      ],
      removable: new Set(["/dev/sdb1"]),
      systemd: true,
      units: false,
      exporter: null,
      program: "/usr/local/sbin/btrfs-backup",
    });
    expect(read.mounts.map(({ path }) => path)).toEqual(["/", "/mnt/my disk"]);
    expect(read.all.length).toBe(3);
  });

  test.each([
    ["no unit files", "", "", "", false],
    ["its unit files, and no argument file", "service timer", "", "", true],
    ["half of them", "timer", "", "", false],
    ["other argument files, which may have timers of their own", "service timer", "", "x", false],
    ["other argument files, and it runs them", "service timer", "enabled\n", "x", true],
  ])("the timer for all is taken with %s: %s", (_, kinds, enabled, file, expected) => {
    const units = kinds.split(" ").map((kind) => `/usr/lib/systemd/system/btrfs-backup.${kind}\n`);
    const files = file === "" ? "" : `/etc/btrfs-backup/${file}.args\n`;
    const text = `N mounts\nN systemd\nyes\nN units\n${kinds === "" ? "" : units.join("")}N forall\n${enabled}N files\n${files}N program\nN end\n`;
    expect(parseSurvey({ nonce: "N", text }).forAll).toBe(expected);
  });

  test("choices are subvolumes, and each filesystem once", () => {
    const mounts = parseMounts(
      [
        "22 1 0:20 /@ / rw - btrfs /dev/sda2 rw",
        "25 22 0:20 /@home /home rw - btrfs /dev/sda2 rw",
        "23 22 0:21 / /backup rw - btrfs /dev/sdb1 rw",
        "26 22 0:21 /deep/er /a rw - btrfs /dev/sdb1 rw",
      ].join("\n"),
    );
    const seen = [
      "256 9123683e 10 20 4096 /a",
      "256 9123683e 50 100 4096 /",
      "256 9123683e 50 100 4096 /home",
      "300 9123683e 50 100 4096 /srv",
      "256 9123683e 10 20 4096 /backup",
      "2 ef53 50 100 4096 /opt",
      "  /gone",
    ].join("\n");
    const choices = choicesIn(mounts, seen);
    expect(choices).toEqual({
      subvolumes: [
        { path: "/", device: "/dev/sda2" },
        { path: "/a", device: "/dev/sdb1" },
        { path: "/backup", device: "/dev/sdb1" },
        { path: "/home", device: "/dev/sda2" },
      ],
      filesystems: [
        { path: "/", device: "/dev/sda2", free: 204800, size: 409600 },
        { path: "/backup", device: "/dev/sdb1", free: 40960, size: 81920 },
      ],
    });
    expect(choicesText(choices)).toContain("  btrfs-backup setup /home /backup/home\n");
    expect(choicesText({ subvolumes: [], filesystems: [] })).toContain("  none\n");
  });
});

describe("what somebody keeps", () => {
  const [first, second, third] = ["0301", "0302", "0303"].map((name) => snap(name)) as [
    Snapshot,
    Snapshot,
    Snapshot,
  ];
  const rules = { policy: parsePolicy("1"), now: FAR };
  const stay = (decisions: readonly Decision<Snapshot>[]) =>
    decisions.map(({ reasons }) => reasons.at(-1) ?? "");

  test("is one more reason, at the source and at a destination, and makes no room", () => {
    const noted = { ...first, kept: "why" };
    expect(stay(planSource([noted, second, third], [], rules))).toEqual([
      "kept by hand: why",
      "",
      "one of the newest 1",
    ]);
    const backups = [backupOf(first, { kept: "" }), backupOf(second), backupOf(third)];
    const state = { backups, copied: new Map<string, string>(), chained: null };
    expect(stay(planDestination([], state, rules))).toEqual([
      "kept by hand",
      "",
      "one of the newest 1",
    ]);
    const coming = [{ snapshot: snap("0304"), parent: third }];
    expect(planRoom([third], state, coming, rules)).toEqual([backups[1] as Backup]);
  });

  test("is dropped from a record when it is gone, and only then", () => {
    const kept = [first, second].map(({ name, uuid: own }) => ({ name, uuid: own, note: "" }));
    const chain = { leaps: ["x"], kept };
    expect(withoutGone(chain, [first, backupOf(second)])).toEqual(chain);
    expect(withoutGone(chain, [second, third])).toEqual({ leaps: ["x"], kept: kept.slice(1) });
    expect(withoutGone(chain, [third])).toEqual({ leaps: ["x"] });
    const line = (of: unknown) => parseRecord(`{"/": 1\n,"": ${JSON.stringify(of)}\n}\n`);
    expect(line(chain).chains.get("")).toEqual(chain);
    for (const wrong of [{}, [1], [{ name: "a", uuid: "b" }], [{ name: 1, uuid: "b", note: "" }]])
      expect(line({ kept: wrong }).unreadable).not.toBeNull();
  });

  test("a mark belongs to its stream; one without a stream, or half of one, is debris", () => {
    const [one] = files("0301a") as [StoredFile];
    const mark = { name: `${one.name}.kept`, bytes: 9 };
    const half = { name: `.${one.name}.kept.part`, bytes: 3 };
    for (const whole of [true, false]) {
      const beside = whole ? [one] : [one, { name: `${one.name}.sha256`, bytes: 1 }];
      const { streams, debris } = parseStreams([...beside, mark, half], whole);
      expect(streams.map(({ kept, readonly }) => [kept, readonly])).toEqual([["", true]]);
      expect([...debris.values()]).toEqual([[half.name]]);
      expect(parseStreams(beside, whole).streams[0]).not.toHaveProperty("kept");
    }
    // Nobody could keep half of an upload: its checksum object is lost.
    const lost = parseStreams([one, mark], false);
    expect([[...lost.debris], lost.unsummed.length]).toEqual([[], 1]);
    expect([...parseStreams([mark], true).debris]).toEqual([["20240301-000000", [mark.name]]]);
  });

  test("a note is a line that a guarded key can write, too", () => {
    for (const note of ["", 'before 6.18: "x"', "vor dem Umbau, größer als ☃"])
      expect(parseNote(note)).toBe(note);
    for (const note of ["a\nb", "\t", "\u007f", "\u202e", "\\n", "x".repeat(201)])
      expect(() => parseNote(note)).toThrow(UsageError);
    expect(shownNote(`a\n20260101-000000  whole${" ".repeat(9)}${"x".repeat(300)}`)).toMatch(
      /^a 20260101-000000 whole x{150,176}$/,
    );
  });
});

describe("room for what is to come", () => {
  test.each([
    ["10%", 1000, 100],
    ["0.5%", 1000, 5],
    ["2k", 1000, 2048],
  ])("%s of %d bytes are %d", (text, size, wanted) =>
    expect(freeOf(parseMinFree(text, 7), size)).toBe(wanted),
  );
  test.each(["", "0", "0%", "100%", "-1%", "10 %", "%", "1t", "1e9", "10%%"])(
    "%j is no size, and no share",
    (text) => expect(() => parseMinFree(text, 7)).toThrow(UsageError),
  );

  test("the oldest go first, and what lasts does not go", () => {
    const all = ["0105", "0106", "0201", "0202", "0203", "0301", "0302"].map((one) => snap(one));
    const backups = all.map((one, i) => backupOf(one, i === 3 ? { kept: "" } : {}));
    const state = { backups, copied: new Map<string, string>(), chained: null };
    const order = (policy: string, newest: number, here: readonly Snapshot[] = []) =>
      planFreeing(here, state, { policy: parsePolicy(policy), now: FAR }, newest).map(({ name }) =>
        name.slice(4, 8),
      );
    expect(order("0", 7)).toEqual([]);
    expect(order("0", 2)).toEqual(["0105", "0106", "0201", "0203"]);
    expect(order("100 400d 60w", 2)).toEqual(["0105", "0106", "0201", "0203"]);
    expect(order("12m", 1)).toEqual(["0106", "0203"]);
    expect(order("1y 3d+", 1)).toEqual(["0106", "0201", "0203", "0301"]);
    expect(order("1m+", 1)).toEqual(["0105", "0106", "0201"]);
    expect(order("0", 1, all.slice(0, 2))).toEqual(["0105", "0201", "0203", "0301"]); // the pin
    // What the clock leapt to is not believed: all that words with m and y could keep stays.
    const leapt = { ...state, backups: [...backups, backupOf(snap("20990101"))] };
    const rules = { policy: parsePolicy("12m"), now: FAR };
    expect(planFreeing([], leapt, rules, 1)).toEqual([]);
  });

  test("of streams, the oldest chain goes from its end, if nothing of it stays", () => {
    const chain = "0301a 0302b<a 0303c<b 0304d 0305e<d 0306f";
    const order = (newest: number, kept = "") => {
      const backups = backupsIn(files(chain)).map((one) =>
        letters([one]) === kept ? { ...one, kept: "" } : one,
      );
      const state = { backups, copied: new Map<string, string>(), chained: [] };
      return planFreeing([], state, { policy: null, now: FAR }, newest)
        .map((one) => letters([one]))
        .join("");
    };
    expect(order(1)).toBe("cbaed");
    expect(order(2)).toBe("cba"); // e needs d
    expect(order(1, "b")).toBe("ced");
    expect(order(1, "c")).toBe("ed");
  });

  test.each([
    [[100], "enough"],
    [[0], "lacking"],
    [[0, 0], "lacking"],
    [[0, 0, 0], "in vain"],
    [[0, 0.9, 1.8], "in vain"],
    [[0, 1, 1], "lacking"],
    [[0, 0, 50], "lacking"],
    [[50, 50.4, 50.8], "in vain"],
    [[50, 49, 49.5, 49.6], "in vain"],
    [[0, 0, 100], "enough"],
  ] as const)("after %j of 100: %s", (free, state) =>
    expect(
      freeingState(
        free.map((bytes) => ({ bytes, held: [] })),
        100,
      ),
    ).toBe(state),
  );

  test("nothing goes in the place of what somebody holds open; who held one before does not count", () => {
    const at = (bytes: number, ...held: string[]) => ({ bytes, held });
    expect(freeingState([at(0, "257"), at(20)], 100)).toBe("lacking");
    expect(freeingState([at(0), at(20, "257")], 100)).toBe("held");
    expect(freeingState([at(0), at(100, "257")], 100)).toBe("enough");
  });

  test("what went for space is not sent again, even if the policy would keep it", () => {
    const here = ["0301", "0302", "0303"].map((one) => snap(one));
    const place = {
      held: [backupOf(here[1] as Snapshot)],
      backups: [backupOf(here[1] as Snapshot)],
      copied: new Map<string, string>(),
      obstacles: new Map<string, Obstacle>(),
      chained: null,
    };
    const options = { incremental: true, newestOnly: false, now: FAR, fullEvery: null };
    const names = (freed: boolean, failed = new Set<string>()) =>
      planTransfers(here, place, {
        ...options,
        policy: parsePolicy("9"),
        freed,
        failed,
      }).transfers.map(({ snapshot }) => snapshot.name.slice(4, 8));
    expect(names(false)).toEqual(["0301", "0303"]);
    expect(names(true)).toEqual(["0303"]);
    expect(names(true, new Set(["s0301"]))).toEqual(["0301", "0303"]); // it was never there
  });
});

describe("trees", () => {
  const listed = (...paths: readonly string[]) =>
    paths.map((path, i) => ({ ...snap("0301"), id: i, path }));
  const [one, two] = [full("0301"), full("0302")];

  test("a member is a plain directory below a place that directly holds snapshots", () => {
    const subvolumes = listed(
      `b/${one}`,
      `b/x/${one}`,
      `b/x/${two}`,
      `b/x/y z/p-${one}`,
      "b/x/other",
      `b/copy`,
      `b/copy/snapshot/${one}`,
      `b/x/${two}/nested/${one}`,
      `b/home.restoring-${one}/${one}`,
      `b/deep.restoring-${one}/tree/snapshot/${one}`,
      `bb/x/${one}`,
      `b/line\nbreak/${one}`,
    );
    expect(membersBelow({ top: "/b", subvolumes }, "")).toEqual(["x"]);
    expect(membersBelow({ top: "/b", subvolumes }, "p-")).toEqual(["x/y z"]);
    expect(membersBelow({ top: "/b", subvolumes }, null)).toEqual(["x", "x/y z"]);
    expect(membersBelow({ top: "/", subvolumes: listed(one, `x/${one}`) }, "")).toEqual(["x"]);
  });

  test("a subvolume of a source can have snapshots in a folder of its own", () => {
    const place = (path: string) => ({
      path,
      inode: 256,
      fsid: "1",
      filesystem: "f",
      root: 5,
      free: 0,
      size: 0,
    });
    const source = { ...place("/s"), top: "/s", uuid: "u" };
    const subvolumes = listed(
      "s",
      "s/x",
      "s/x/y",
      `s/snapshot/${one}`,
      `s/snapshot/x/y/${one}`,
      `s/x/snapshot/${one}`,
      `s/plain/snapshot/${one}`,
      `other/snapshot/${one}`,
    );
    const own = (top: string, from: typeof source | null = source) => [
      ...ownFoldersIn({ source: from, top, subvolumes }, ""),
    ];
    expect(own("/s/snapshot")).toEqual([["x", "x/snapshot"]]);
    expect([own("/elsewhere"), own("/s"), own("/s/snapshot", null)]).toEqual([[], [], []]);
  });

  test("only folders whose sources lie below the root's source belong to its tree", () => {
    const by = (host: string, path: string) => ({ chain: { owner: { uuid: "u", host, path } } });
    const found = new Map<string, { chain: ChainRecord }>([
      ["x", by("h", "/s/x")],
      ["x/y", by("h", "/s/x/y")],
      ["other", by("h", "/else/other")],
      ["moved", by("h", "/s/x")],
      ["hers", by("hers", "/s/hers")],
      ["bare", { chain: {} }],
    ]);
    const split = (owner: SourceIdentity | undefined) => {
      const { members, foreign } = membersOf(owner, found);
      return [[...members.keys()], foreign];
    };
    const foreign = ["other", "moved", "hers", "bare"];
    expect(split({ uuid: "r", host: "h", path: "/s" })).toEqual([["x", "x/y"], foreign]);
    // A plain directory's tree has no owner: most of the others tell.
    expect(split(undefined)).toEqual([["x", "x/y"], foreign]);
    expect(split({ uuid: "r", host: "h", path: "/" })[0]).toEqual([]);
    const atRoot = new Map([["x", by("h", "/x")]]);
    expect([...membersOf({ uuid: "r", host: "h", path: "/" }, atRoot).members.keys()]).toEqual([
      "x",
    ]);
  });

  test("each member gives the run's backup, or its newest before it, or nothing", () => {
    const whole = new Map([
      ["x/y", snaps("0301 0302 0303")],
      ["", snaps("0301 0302 0303")],
      ["late", snaps("0303")],
      ["x", snaps("0301 0303")],
      ["gone", snaps("0301")],
    ]);
    const planned = (short: string, gone: Record<string, string> = { gone: two }) => {
      const {
        chosen,
        earlier,
        gone: left,
      } = planTree({ name: full(short), time: at(short) }, whole, gone);
      return [[...chosen].map(([path, { uuid }]) => `${path} ${uuid}`), earlier, left];
    };
    expect(planned("0302")).toEqual([[" s0302", "x s0301", "x/y s0302"], ["x"], ["gone"]]);
    expect(planned("0301")).toEqual([[" s0301", "gone s0301", "x s0301", "x/y s0301"], [], []]);
    expect(planned("0303", {})).toEqual([
      [" s0303", "gone s0301", "late s0303", "x s0303", "x/y s0303"],
      ["gone"],
      [],
    ]);
    expect(planned("0228")).toEqual([[], [], []]);
    // A mark that a member's own backups belie, as a stolen key may write it, keeps nothing back.
    const belied = planTree(
      { name: full("0303"), time: at("0303") },
      new Map([["x", snaps("0301 0302")]]),
      { x: two },
    );
    expect([[...belied.chosen.keys()], belied.gone]).toEqual([["x"], []]);
    // A path can have any name.
    const odd = planTree(
      { name: one, time: at("0301") },
      new Map([["constructor", snaps("0301")]]),
      {},
    );
    expect([...odd.chosen.keys()]).toEqual(["constructor"]);
  });

  test("a line for each member, also for one whose backups are all deleted", () => {
    const whole = new Map([
      ["b", snaps("0301 0302")],
      ["a", snaps("0301")],
    ]);
    expect(memberLines(whole, { a: two, c: one })).toEqual([
      { path: "a", count: 1, oldest: one, newest: one, gone: two, snapshots: [one] },
      { path: "b", count: 2, oldest: one, newest: two, gone: null, snapshots: [one, two] },
      { path: "c", count: 0, oldest: null, newest: null, gone: one, snapshots: [] },
    ]);
    expect(memberLines(new Map([["toString", []]]), {})[0]?.gone).toBe(null);
  });

  test("which subvolume of which tree has a file", () => {
    const subvolumes = listed(
      "s",
      "s/x",
      "s/own",
      `s/snapshot/${one}`,
      `s/snapshot/x/${one}`,
      `s/snapshot/x/lost/${one}`,
      `s/own/snapshot/${one}`,
      `all/c/${one}`,
      "plain/c",
    );
    const having = (file: string, folder: string | null = null) => {
      const found = memberHaving({ file, folder }, "snapshot", subvolumes);
      return found && `${found.source} ${found.member} in ${found.folder}`;
    };
    expect(having("/s/x/dir/file")).toBe("/s x in /s/snapshot/x");
    expect(having("/s/x/lost/file")).toBe("/s x/lost in /s/snapshot/x/lost");
    expect([having("/s/dir/file"), having("/s/own/file"), having("/none/file")]).toEqual([
      null,
      null,
      null,
    ]);
    expect(having("/plain/c/file", "/all")).toBe("/plain c in /all/c");
  });

  test("what a record says of a tree is checked like the rest", () => {
    const read = (tree: unknown) => parseRecord(`{"/": 1\n,"": ${JSON.stringify({ tree })}\n}\n`);
    expect(read({ gone: { "x/y": one } }).chains.get("")).toEqual({
      tree: { gone: { "x/y": one } },
    });
    expect(asWritten({ tree: { gone: {} } }, [], "")).toEqual({ tree: { gone: {} } });
    // A guarded key's recursive run writes it, too.
    const now = { chain: {}, entries: new Set<string>(), standing: [], prefix: "" };
    expect(guardedRecord(`{"tree":{"gone":{"x":"${one}"}}}`, now, false)).toEqual({
      tree: { gone: { x: one } },
    });
    for (const tree of [
      null,
      1,
      {},
      { gone: [] },
      { gone: { "../x": one } },
      { gone: { "/x": one } },
      { gone: { "": one } },
      { gone: { "x//y": one } },
      { gone: { x: "never" } },
      { gone: { x: 1 } },
    ])
      expect([tree, read(tree).unreadable]).toEqual([tree, expect.any(String)]);
  });

  test("what an interrupted restore of a tree left is removed, whatever its subvolumes are called", () => {
    const work = `home.restoring-${one}`;
    const paths = [
      `${work}/members`,
      `${work}/tree`,
      `${work}/tree/a`,
      `${work}/tree/a/b`,
      `${work}/tree/snapshot/a/${one}`,
      `${work}/${one}`,
      `${work}/mine`,
    ];
    const place = { top: "/", entries: new Set([work]), subvolumes: listed(...paths) };
    expect([...leftoversOf("home", place)]).toEqual([
      [
        work,
        [`./tree/snapshot/a/${one}`, "./tree/a/b", "./tree/a", "./members", "./tree", `./${one}`],
      ],
    ]);
  });
});

describe("what others took", () => {
  const foreign = (id: number, fields: Partial<Foreign> = {}): Foreign => ({
    id,
    path: `.snapshots/${id}/snapshot`,
    uuid: `f${id}`,
    parentUuid: "source",
    receivedUuid: null,
    readonly: true,
    cgen: id,
    below: `${id}/snapshot`,
    moment: at("0101") + id,
    words: null,
    ...fields,
  });
  const copyOf = (short: string, id: number, fields: Partial<Snapshot> = {}) =>
    snap(short, { parentUuid: `f${id}`, ...fields });
  const source = (fields: Partial<Subvolume> = {}): Subvolume => ({
    ...foreign(1),
    uuid: "source",
    parentUuid: null,
    readonly: false,
    ...fields,
  });
  const ids = (some: readonly Foreign[]) => some.map(({ id }) => id).join(" ");
  const plan = (
    found: readonly Foreign[],
    chain: readonly Snapshot[] = [],
    all: readonly Subvolume[] = [],
  ) => {
    const known = [source(), ...found, ...all];
    const planned = planImport(found, chain, {
      uuid: "source",
      all: new Map(known.map((one) => [one.uuid, one])),
    });
    const { coming, older, writable, unrelated } = planned;
    return [coming, older, writable, unrelated].map(ids).join("|");
  };
  const some = [foreign(30), foreign(10), foreign(20)];

  test.each<[string, string, Parameters<typeof plan>]>([
    ["all, in the order of their making, into an empty chain", "10 20 30|||", [some]],
    ["nothing twice", "|||", [some, [copyOf("0101", 10), copyOf("0102", 20), copyOf("0103", 30)]]],
    ["what is newer than the original of the newest", "30|10||", [some, [copyOf("0105", 20)]]],
    [
      "also where that is gone, and its copy has a later name",
      "30|||",
      [[foreign(30)], [copyOf("0105", 20)], [foreign(20)]],
    ],
    [
      "by the moment where nothing is known of it",
      "30|10||",
      [
        [foreign(10, { moment: at("0103") }), foreign(30, { moment: at("0105") })],
        [copyOf("0104", 20)],
      ],
    ],
    [
      "by the moment where the newest one was taken here",
      "10|30||",
      [[foreign(10, { moment: at("0105") }), foreign(30, { moment: at("0103") })], [snap("0104")]],
    ],
    [
      "by the moment where the newest one was received",
      "|10 30||",
      [[foreign(10), foreign(30)], [copyOf("0105", 20, { receivedUuid: "x" })], [foreign(20)]],
    ],
    [
      "what was deleted here stays away",
      "30|10 20||",
      [[...some], [copyOf("0105", 25)], [foreign(25)]],
    ],
    [
      "neither what is writable, nor another's, nor what was received; SOURCE itself is not told",
      "40||10|20 30",
      [
        [
          foreign(10, { readonly: false }),
          foreign(20, { parentUuid: "other" }),
          foreign(30, { receivedUuid: "x" }),
          foreign(40),
          foreign(50, { uuid: "source", readonly: false }),
        ],
      ],
    ],
    [
      "after a rollback, those of the system before, and not what goes on beside",
      "10 20 60|||70",
      [
        [
          foreign(10, { parentUuid: "old" }),
          foreign(20, { parentUuid: "old" }),
          foreign(60),
          foreign(70, { parentUuid: "old" }),
        ],
        [],
        [source({ parentUuid: "f10", cgen: 50 })],
      ],
    ],
    ["nothing where a parent is not told", "|||10", [[foreign(10, { parentUuid: null })]]],
  ])("%s", (_, expected, given) => expect(plan(...given)).toBe(expected));

  test.each<[string, string | null]>([
    ["2026-01-31_23-59-58/@", "20260131-235958"],
    ["2026-01-31_23-59-58/@home", "20260131-235958"],
    ["home.20260131", "20260131-000000"],
    ["a.b.20260131_12", "20260131-000000"],
    ["home.20260131T2359", "20260131-235900"],
    ["home.20260131T235958+0000_1", "20260131-235958 UTC"],
    ["home.20260131T235958-0130", "20260201-012958 UTC"],
    ["home.20260131T235958+0530", "20260131-182958 UTC"],
    ["home.20260230", null],
    ["home.20260131T2360", null],
    ["home.20260131T2359+0000", null],
    ["home.20260131/x", null],
    ["20260131", null],
    ["2026-01-31_23-59-58/@/@", null],
    ["home.20260131-235958", null],
    ["", null],
  ])("the moment of %s", (below, expected) => {
    const moment = foreignMoment(below);
    const isUtc = expected?.endsWith("UTC") === true;
    const time = expected === null ? null : parseName(expected.slice(0, 15), "");
    expect(moment).toBe(time === null || isUtc ? time : momentOf(time));
  });

  test("an original tells what its copy is an earlier state of, unless it was changed before", () => {
    const ghost = { ...snap("0001"), uuid: "f10", cgen: 10 };
    const later = { ...snap("0002"), uuid: "f20", cgen: 20 };
    const [one, other] = [copyOf("0101", 10, { cgen: 30 }), copyOf("0102", 20, { cgen: 40 })];
    const own = snap("0103", { cgen: 50 });
    const facts = (ctransid: number) => ({
      all: new Map([ghost, later, one, other, source()].map((it) => [it.uuid, it])),
      ctransids: new Map([one, other].map(({ uuid }) => [uuid, ctransid])),
      births: new Map(),
      losses: new Map(
        [`${one.uuid} ${other.uuid}`, `${one.uuid} ${own.uuid}`].map((k) => [k, "no"]),
      ),
    });
    const isFit = (ctransid: number, parent: Snapshot, of: Snapshot) =>
      judge(facts(ctransid), { cleared: {}, refused: new Map() }, () => true).unfit(parent, of) ===
      null;
    expect([isFit(9, one, other), isFit(10, one, own)]).toEqual([true, true]);
    expect([isFit(11, one, other), isFit(11, one, own)]).toEqual([false, false]);
    expect(isFit(9, other, one)).toBe(false);
  });

  test("a parent that stands elsewhere is only one, and is reached below the root of the mount", () => {
    const [x, c] = [snap("0101", { beyond: "../x" }), copyOf("0102", 1)];
    const { transfers, skipped } = planTransfers([x, c], standing([backupOf(x)]), {
      policy: parsePolicy("9"),
      incremental: true,
      newestOnly: false,
      now: FAR,
      fullEvery: null,
    });
    expect(transfers).toEqual([{ snapshot: c, parent: x }]);
    expect(skipped).toBe(0);
    expect(
      planTransfers([x, c], standing([]), {
        policy: null,
        incremental: true,
        newestOnly: false,
        now: FAR,
        fullEvery: null,
      }).transfers,
    ).toEqual([{ snapshot: c, parent: null }]);
    const mounts = parseMounts(
      "1 0 0:1 /@ / rw - btrfs /dev/a rw\n2 1 0:1 /@home /home rw - btrfs /dev/a rw",
    );
    const reach = (path: string, top: string, below: string, fenced = true) =>
      beyondFolder({ mounts, top, fenced, place: { path } as Folder["place"] }, below);
    expect(reach("/home/snapshot", "/@home/snapshot", "/@home/.snapshots/1/snapshot")).toBe(
      "../.snapshots/1/snapshot",
    );
    expect(reach("/home/snapshot", "/@home/snapshot", "/@/x")).toBeNull();
    expect(reach("/s", "/@/s", "/@/x", false)).toBeNull();
  });

  test("a difference with nothing but its frame, and what a run writes in its own folder", () => {
    const { path, pathTo, uuid, ctransid, cloneUuid, cloneCtransid } = attribute;
    const U = numberedUuid(1);
    const frame = command(
      "snapshot",
      path("s"),
      uuid(U),
      ctransid(7),
      cloneUuid(U),
      cloneCtransid(5),
    );
    const isNone = (own: string | null, ...commands: Buffer[]) =>
      isOnlyFrame(stream(frame, ...commands, command("end")), own);
    const on = (name: Parameters<typeof command>[0], where: string) => command(name, path(where));
    const rename = (from: string, to: string) => command("rename", path(from), pathTo(to));
    const record = [
      on("unlink", "a/snapshot/.btrfs-backup.json"),
      on("mkfile", "o263-9-0"),
      rename("o263-9-0", "a/snapshot/.btrfs-backup.json"),
      on(22, "a/snapshot/.btrfs-backup.json"),
      on("utimes", "a/snapshot"),
    ];
    expect(isNone(null)).toBe(true);
    expect(isNone("a/snapshot", ...record)).toBe(true);
    expect(isNone(null, ...record)).toBe(false);
    expect(isNone("b", ...record)).toBe(false);
    for (const change of [
      on("utimes", ""),
      on("utimes", "a/snapshot/x"),
      on("mkfile", "a/snapshot/.btrfs-backups"),
      on("mkdir", "a/snapshot/.btrfs-backup.x/y"),
      on("chmod", "a/snapshot"),
      on("mkfile", "o264-9-0"),
      on(99, "a/snapshot/.btrfs-backup.json"),
      rename("a/snapshot/.btrfs-backup.json", "taken"),
      rename("b", "a/snapshot/.btrfs-backup.json"),
    ])
      expect(isNone("a/snapshot", ...record, change)).toBe(false);
    expect(() => isOnlyFrame(stream(frame), null)).toThrow("early");
    expect(isOnlyFrame(stream(frame, on("mkfile", "x")), null)).toBe(false);
  });

  test("what a host says of a directory", () => {
    const nonce = "N";
    const uuids = [1, 2, 3].map(numberedUuid);
    const line = (id: number, path: string) =>
      `ID ${id} gen 9 cgen ${id} top level 5 parent_uuid ${uuids[0]} received_uuid - uuid ${uuids[id - 256]}\tpath ${path}`;
    const said = (sections: Record<string, string>) =>
      Object.entries(sections)
        .map(([name, text]) => `\n${nonce} ${name}\n${text}\n`)
        .join("");
    const sections = {
      dir: "/home/.snapshots",
      mounts: "1 0 0:1 / / rw - btrfs /dev/a rw",
      subvolumes: `${line(256, "home")}\n${line(257, "<FS_TREE>/home/.snapshots/1/snapshot")}\n${line(258, "else/2/snapshot")}`,
      readonly: "ID 257 gen 9 top level 5 path <FS_TREE>/home/.snapshots/1/snapshot",
      snapper:
        "./1/info.xml   <date>2026-01-02 03:04:05</date>\n./1/info.xml   <description>a &lt;b&gt; \u202e&amp;amp; c</description>",
      end: "",
    };
    const { found } = parseForeign(said(sections), nonce);
    expect(
      found.map(({ id, below, moment, words, readonly }) => [id, below, moment, words, readonly]),
    ).toEqual([[257, "1/snapshot", Date.UTC(2026, 0, 2, 3, 4, 5), "a <b>  &amp; c", true]]);
    expect(narrowedForeign(said(sections), nonce)).toBe(
      said({ ...sections, subvolumes: sections.subvolumes.split("\n")[1] ?? "" }),
    );
    const { end: _, ...cut } = sections;
    expect(() => parseForeign(said(cut), nonce)).toThrow("does not print");
    expect(() => parseForeign(said({ ...sections, dir: "x" }), nonce)).toThrow("dir");
    // Without info.xml a snapshot is not yet finished, or no longer there.
    expect(parseForeign(said({ ...sections, snapper: "" }), nonce).found).toEqual([]);
  });
});
