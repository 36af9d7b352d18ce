// Reading what others print and write, and writing what shells read.

import { afterAll, describe, expect, spyOn, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import type { ArgsDef } from "citty";
import {
  adviceOn,
  commandFor,
  COMMANDS,
  culpritOf,
  metricsOfAll,
  metricsOfDrills,
  entryName,
  type EntryName,
  editDistance,
  expandFiles,
  Failure,
  filesystemOf,
  foldersBelow,
  hostOf,
  inBytes,
  inWords,
  listOptions,
  log,
  type Option,
  OPTIONS,
  parseCompression,
  parseInspection,
  parseListing,
  parseLocation,
  parseMounts,
  parseName,
  parseOldRecord,
  parseRate,
  parseRecord,
  parseStats,
  parseSubvolumes,
  parseWhen,
  type Figures,
  placeOn,
  progressLine,
  progressNews,
  quote,
  readArguments,
  runOptions,
  summaryOf,
  alignedTable,
  UsageError,
  manualOf,
  type Verb,
  oneLine,
  parametersOf,
  sh,
  usableKeys,
  typedVerb,
  VERBS,
  Verification,
  visible,
  wordsFor,
  subvolumeAround,
  type Subvolume,
} from "../btrfs-backup.ts";

const U = (n: number) => `${String(n).padStart(8, "0")}-aaaa-bbbb-cccc-0123456789ab`;

describe("btrfs subvolume list", () => {
  const line = (id: number, path: string, { parent = "-", received = "-", uuid = U(id) } = {}) =>
    `ID ${id} gen 12 cgen 7 top level 5 parent_uuid ${parent.padEnd(36)} received_uuid ${received.padEnd(36)} uuid ${uuid} path ${path}`;
  const readonly = (id: number, path: string) => `ID ${id} gen 12 top level 5 path ${path}`;

  test("every field is read, and a dash is no UUID", () => {
    const all = [
      line(256, "home"),
      line(300, "<FS_TREE>/home/snapshot/20240101-000000", { parent: U(256), received: U(7) }),
    ].join("\n");
    expect(parseSubvolumes(all, readonly(300, "<FS_TREE>/home/snapshot/20240101-000000"))).toEqual([
      {
        id: 256,
        path: "home",
        uuid: U(256),
        parentUuid: null,
        receivedUuid: null,
        readonly: false,
        cgen: 7,
      },
      {
        id: 300,
        path: "home/snapshot/20240101-000000",
        uuid: U(300),
        parentUuid: U(256),
        receivedUuid: U(7),
        readonly: true,
        cgen: 7,
      },
    ]);
  });

  test("no subvolumes", () => expect(parseSubvolumes("", "")).toEqual([]));

  test.each(["ends\n", "ends twice\n\n", "\n"])(
    "the path %j is kept as it is where it is the last one",
    (path) =>
      expect(
        parseSubvolumes(line(256, path), readonly(256, path)).map((s) => [s.path, s.readonly]),
      ).toEqual([[path, true]]),
  );

  test.each([
    "with blanks  in it",
    " and at both ends ",
    "uuid - path x",
    "line\nbreak",
    "\nat the ends\n",
    "a\n\nb",
    "ID of mine\nID 5",
    "ünïcode 'quoted'",
    "not/<FS_TREE>/at the start",
  ])("the path %j is kept as it is", (path) => {
    const parsed = parseSubvolumes(
      [line(256, path), line(257, "next")].join("\n"),
      [readonly(256, path), readonly(257, "next")].join("\n"),
    );
    expect(parsed.map((s) => [s.id, s.path, s.readonly])).toEqual([
      [256, path, true],
      [257, "next", true],
    ]);
  });

  test.each<[string, string, string]>([
    ["an error message", "ERROR: not a btrfs filesystem", ""],
    ["a line without UUIDs", readonly(256, "home"), ""],
    ["no UUID where one should be", line(256, "home", { uuid: "unknown" }), ""],
    [
      "an upper-case UUID, which btrfs never prints",
      line(256, "home", { uuid: U(256).toUpperCase() }),
      "",
    ],
    ["fields in another order", `ID 256 cgen 3 gen 12 top level 5 uuid ${U(256)} path home`, ""],
    ["an error message where the read-only ones should be", line(256, "home"), "ERROR: cannot"],
  ])("%s is an error, not a guess", (_, all, readonlyOnes) =>
    expect(() => parseSubvolumes(all, readonlyOnes)).toThrow(Failure),
  );
});

test("mounts that compress, and those of which nobody can tell", () => {
  const of = (type: string, options: string) =>
    parseMounts(`1 0 0:3 / /mnt rw - ${type} /dev/a ${options}`)[0]?.compresses === true;
  for (const options of [
    "rw,compress=zstd:3,ssd",
    "rw,compress-force=lzo",
    "rw,compress",
    "compress",
  ])
    expect(of("btrfs", options)).toBe(true);
  for (const options of ["rw", "rw,compress=no", "rw,subvol=/compress=zstd"])
    expect(of("btrfs", options)).toBe(false);
  expect([of("ext4", "rw"), of("zfs", "rw"), of("nfs4", "rw")]).toEqual([false, true, true]);
});

describe("mounts", () => {
  const mounts = parseMounts(
    [
      "22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
      "30 22 0:30 / /mnt rw - btrfs /dev/sdb rw",
      "31 30 0:30 /@home /mnt/home rw - btrfs /dev/sdb rw,subvol=/@home",
      "32 22 0:30 /a\\040b\\134c /with\\040blank\\011tab\\012line rw - btrfs /dev/sdb rw",
      "33 22 0:31 / /over rw - tmpfs tmpfs rw",
      "34 22 0:32 /on/top /over rw - btrfs /dev/sdc rw",
      "35 33 0:33 /beside /over/below rw - btrfs /dev/sdd rw",
      "36 22 0:34 / /s/a rw - btrfs /dev/sde rw",
      "37 22 0:35 / /s rw - btrfs /dev/sdf rw",
      "38 37 0:36 /x /s/b rw - btrfs /dev/sdg rw",
    ].join("\n"),
  );
  test.each<[string, string]>([
    ["/", "/"],
    ["/etc", "/etc"],
    ["/mnt", "/"],
    ["/mnt/backup", "/backup"],
    ["/mnt/home", "/@home"],
    ["/mnt/home/x/y", "/@home/x/y"],
    ["/mnt/homes", "/homes"], // a beginning, but not a folder above
    ["/with blank\ttab\nline/d", "/a b\\c/d"],
    ["/over/d", "/on/top/d"], // the last one mounted there
    ["/over/below/d", "/on/top/below/d"], // what was mounted below it is not seen any more
    ["/s/a/src", "/a/src"],
    ["/s/b/src", "/x/src"],
  ])("%j is %j on its filesystem", (path, top) => expect(placeOn(mounts, path).top).toBe(top));

  test("read-only is the mount or its filesystem", () =>
    expect(
      [
        "rw - btrfs d rw",
        "ro - btrfs d rw",
        "rw,noatime - btrfs d ro,ssd",
        "rw,errors=ro - btrfs d rw",
      ].map((rest) => parseMounts(`1 2 0:3 / /mnt ${rest}`)[0]?.readonly),
    ).toEqual([false, true, true, false]));
  test("a path under no mount is an error", () =>
    expect(() => placeOn(parseMounts("30 22 0:30 / /mnt rw - btrfs /dev/sdb rw"), "/home")).toThrow(
      Failure,
    ));
});

describe("filesystems", () => {
  const uuid = "85d7a547-9cd7-4425-8fb7-cd4d35349376"; // seen on a real one
  const others = [U(1), "features", "85d7a547-9cd7-4425-8fb7-cd4d35349377", ""];
  test.each<[string, number, string | null]>([
    ["a60680aa9e3d653", 256, uuid],
    ["a60680aa9e3d756", 5, uuid],
    ["a60680aa9e3d653", 5, null],
    ["0", 5, null],
  ])("fsid %s below subvolume %d", (fsid, root, found) =>
    expect(filesystemOf(fsid, root, [...others, uuid])).toBe(found),
  );
  test("unknown where nothing is known", () =>
    expect(filesystemOf("a60680aa9e3d653", 256, ["features", ""])).toBeNull());
});

describe("the record", () => {
  const owner = { uuid: U(1), host: "here", path: "/home" };
  const pin = { name: "20240101-000000", uuid: U(2) };
  const destinations = [
    { location: "/backup", filesystem: U(3), pin, last: "2024-01-01T00:00:00.000Z" },
    { location: "shell://cat", filesystem: null, pin: null, last: null },
  ];
  const written = (...lines: string[]) =>
    `{"/": 1\n${lines.map((line) => `${line}\n`).join("")}}\n`;

  test("what was written is read, each prefix on its line", () => {
    const chain = { owner, receiving: "20240102-000000", strangers: [U(4)], destinations };
    const { chains, unreadable } = parseRecord(
      written(`,"": ${JSON.stringify(chain)}`, `,"home-": {}`),
    );
    expect(unreadable).toBeNull();
    expect([...chains]).toEqual([
      ["", chain],
      ["home-", {}],
    ]);
  });

  test("it is valid JSON as a whole", () => {
    expect(JSON.parse(written(`,"": ${JSON.stringify({ owner })}`, `,"2": {}`))).toEqual({
      "/": 1,
      "": { owner },
      "2": {},
    });
  });

  test.each([
    "2024",
    "0",
    "-1",
    "1e3",
    "__proto__",
    "constructor",
    'a"b',
    "back\\slash",
    "é",
    ',": ',
    "{}",
  ])("the prefix %j is one like any other", (prefix) => {
    const { chains, unreadable } = parseRecord(
      written(`,"first": {}`, `,${JSON.stringify(prefix)}: ${JSON.stringify({ owner })}`),
    );
    expect(unreadable).toBeNull();
    expect([...chains]).toEqual([
      ["first", {}],
      [prefix, { owner }],
    ]);
  });

  test("none, and an empty one", () => {
    expect(parseRecord("")).toEqual({ chains: new Map(), unreadable: null });
    expect(parseRecord(written())).toEqual({ chains: new Map(), unreadable: null });
  });

  test.each<[string, string]>([
    ["nonsense", "hello"],
    ["only white space", "\n"],
    ["JSON by somebody else", `{"": {}}`],
    ["another version", `{"/": 2\n}\n`],
    ["cut short after a line", `{"/": 1\n,"": {}\n`],
    ["cut short in a line", `{"/": 1\n,"": {"owner`],
    ["zeros after a power cut", "\0".repeat(64)],
    ["a line edited by hand", written(`,"":  {}`)],
    ["two prefixes on a line", written(`,"a": {}, "b": {}`)],
    ["an empty line", written("")],
    ["a line break in the middle", written(`,"": {"owner":`, `{}}`)],
    ["no object", written(`,"": null`)],
    ["an owner that is none", written(`,"": {"owner":{"uuid":5}}`)],
    ["an owner that is null", written(`,"": {"owner":null}`)],
    ["a pin that is none", written(`,"": {"destinations":[{"location":"/b","pin":{"name":5}}]}`)],
    ["a destination without a name", written(`,"": {"destinations":[{"pin":null}]}`)],
    ["strangers that are none", written(`,"": {"strangers":[5]}`)],
    ["a name that is a number", written(`,"": {"receiving":5}`)],
  ])("%s: unreadable, and nothing of it is believed", (_, text) => {
    const { chains, unreadable } = parseRecord(text);
    expect(unreadable).toBeString();
    expect(chains.size).toBe(0);
  });
});

describe("what 0.3.1 left", () => {
  const [a, b] = ["20240101-000000", "20240102-000000"];
  test.each<[string, string, object]>([
    [
      "0.3.1's form",
      JSON.stringify({
        [a]: { parent_locks: ["/x", "ssh://h/y"] },
        [b]: { locks: ["/x"], parent_locks: ["/z"] },
      }),
      { receiving: { "/x": [b] }, parents: { "/x": [a], "ssh://h/y": [a], "/z": [b] } },
    ],
    [
      "0.2's form",
      JSON.stringify({ [a]: ["/x"], [b]: ["/x", "/y"] }),
      { receiving: { "/x": [a, b], "/y": [b] }, parents: {} },
    ],
    ["empty", "{}", { receiving: {}, parents: {} }],
    ["no file", "", { receiving: {}, parents: {} }],
    ["nonsense", "hello", { receiving: {}, parents: {} }],
    ["null", "null", { receiving: {}, parents: {} }],
    [
      "wrong types",
      JSON.stringify({ [a]: { locks: 5, parent_locks: [5, null, "/x"] }, [b]: "locks" }),
      { receiving: {}, parents: { "/x": [a] } },
    ],
  ])("%s", (_, text, expected) => {
    const { receiving, parents } = parseOldRecord(text);
    expect({
      receiving: Object.fromEntries(receiving),
      parents: Object.fromEntries(parents),
    }).toEqual(expected as never);
  });
});

describe("locations", () => {
  const ssh = (user: string | null, name: string, port: string | null) => ({ user, name, port });
  test.each<[string, object]>([
    ["/backup", { kind: "folder", id: "/backup", host: null, path: "/backup" }],
    ["/a/../b//c/", { kind: "folder", id: "/b/c", host: null, path: "/b/c" }],
    ["/", { kind: "folder", id: "/", host: null, path: "/" }],
    [
      "/with\nline break",
      { kind: "folder", id: "/with\nline break", host: null, path: "/with\nline break" },
    ],
    [
      "relative",
      {
        kind: "folder",
        id: `${process.cwd()}/relative`,
        host: null,
        path: `${process.cwd()}/relative`,
      },
    ],
    [
      "-dash",
      { kind: "folder", id: `${process.cwd()}/-dash`, host: null, path: `${process.cwd()}/-dash` },
    ],
    [
      "ssh://host/p",
      { kind: "folder", id: "ssh://host/p", host: ssh(null, "host", null), path: "/p" },
    ],
    [
      "ssh://me@host:2222/p/../q/",
      { kind: "folder", id: "ssh://me@host:2222/q", host: ssh("me", "host", "2222"), path: "/q" },
    ],
    [
      "ssh://host/",
      { kind: "folder", id: "ssh://host/", host: ssh(null, "host", null), path: "/" },
    ],
    [
      "ssh://me@realm@host/p",
      {
        kind: "folder",
        id: "ssh://me@realm@host/p",
        host: ssh("me@realm", "host", null),
        path: "/p",
      },
    ],
    [
      "ssh://[::1]:22/p",
      { kind: "folder", id: "ssh://[::1]:22/p", host: ssh(null, "::1", "22"), path: "/p" },
    ],
    [
      "ssh://host/a:b@c",
      { kind: "folder", id: "ssh://host/a:b@c", host: ssh(null, "host", null), path: "/a:b@c" },
    ],
    [
      "ssh://-oProxyCommand=x/p",
      {
        kind: "folder",
        id: "ssh://-oProxyCommand=x/p",
        host: ssh(null, "-oProxyCommand=x", null),
        path: "/p",
      },
    ], // stands behind -- later
    ["shell://cat > '/x'", { kind: "shell", id: "shell://cat > '/x'", command: "cat > '/x'" }],
  ])("%j", (text, expected) => expect(parseLocation(text)).toEqual(expected as never));

  test.each([
    "",
    "a\0b",
    "ssh://",
    "ssh://host",
    "ssh://host:x/p",
    "ssh://host:/p",
    "ssh:///p",
    "ssh://host/a\nb",
    "ssh://host/a\rb",
    "shell://",
    "shell://  ",
    "http://host/p",
    "ftp+tls://h/p",
  ])("%j is a usage error", (text) => expect(() => parseLocation(text)).toThrow(UsageError));
});

const TABLE: ArgsDef = {
  "num-snapshots": { type: "string", alias: "N" },
  "snapshot-folder": { type: "string", alias: "f" },
  "ssh-opt": { type: "string" },
  quiet: { type: "boolean", alias: "q" },
  "no-snapshot": { type: "boolean", alias: "S" },
  sync: { type: "boolean", alias: "s" },
  source: { type: "positional" },
};

describe("arguments", () => {
  const read = (...args: string[]) => {
    const given = readArguments(args, TABLE);
    const options = (["num-snapshots", "snapshot-folder"] as const)
      .map((name) => [name, given.value(name)] as const)
      .filter(([, value]) => value !== null);
    const flags = (["quiet", "no-snapshot", "sync"] as const)
      .filter((name) => given.flag(name))
      .map((name) => [name, true] as const);
    const all = given.all("ssh-opt");
    return {
      ...Object.fromEntries([...options, ...flags, ...(all.length > 0 ? [["ssh-opt", all]] : [])]),
      _: given.positionals,
    };
  };
  test.each<[string[], object]>([
    [[], { _: [] }],
    [["-qS", "/a", "/b"], { quiet: true, "no-snapshot": true, _: ["/a", "/b"] }],
    [["-qsS"], { quiet: true, sync: true, "no-snapshot": true, _: [] }],
    [["-N5"], { "num-snapshots": "5", _: [] }],
    [["-N", "5"], { "num-snapshots": "5", _: [] }],
    [["-qN5"], { quiet: true, "num-snapshots": "5", _: [] }],
    [["-qN", "5"], { quiet: true, "num-snapshots": "5", _: [] }],
    [["--num-snapshots", "24h 7d"], { "num-snapshots": "24h 7d", _: [] }],
    [["--num-snapshots=24h 7d"], { "num-snapshots": "24h 7d", _: [] }],
    [["--snapshot-folder="], { "snapshot-folder": "", _: [] }],
    [["--snapshot-folder=a=b"], { "snapshot-folder": "a=b", _: [] }],
    [["-N", "5", "-N", "6"], { "num-snapshots": "6", _: [] }],
    [["--ssh-opt", "Port=22", "--ssh-opt=User=x"], { "ssh-opt": ["Port=22", "User=x"], _: [] }],
    [["/a", "-q", "/b"], { quiet: true, _: ["/a", "/b"] }],
    [["-q", "--", "-x", "--sync"], { quiet: true, _: ["-x", "--sync"] }],
  ])("%j", (args, expected) => expect(read(...args)).toEqual(expected as never));

  const problem = (...args: string[]) => {
    try {
      read(...args);
    } catch (error) {
      expect(error).toBeInstanceOf(UsageError);
      return (error as Error).message;
    }
    return "none";
  };
  test.each<[string[], string]>([
    [["--quite"], "unknown option --quite; did you mean --quiet?"],
    [["--num-snapshot=5"], "unknown option --num-snapshot; did you mean --num-snapshots?"],
    [["--nosnapshot", "/a"], "unknown option --nosnapshot; did you mean --no-snapshot?"],
    [["--frobnicate"], "unknown option --frobnicate"],
    [["-x"], "unknown option -x"],
    [["-qx"], "unknown option -x"],
    [["/a", "--source", "/b"], "unknown option --source"], // a positional is no option
  ])("%j: %s", (args, message) => expect(problem(...args)).toBe(message));

  test.each<[string[], RegExp]>([
    [["-N"], /num-snapshots/],
    [["--num-snapshots"], /num-snapshots/],
    [["-N", "--quiet"], /-N/],
    [["--quiet=yes"], /quiet/],
  ])("%j is an error of one line that names the option", (args, message) => {
    expect(problem(...args)).toMatch(message);
    expect(problem(...args)).not.toContain("\n");
  });

  test("how far one word is from another", () => {
    const table = [
      ["", ""],
      ["a", ""],
      ["", "ab"],
      ["abc", "abc"],
      ["abc", "abd"],
      ["kitten", "sitting"],
    ] as const;
    expect(table.map(([a, b]) => editDistance(a, b))).toEqual([0, 1, 2, 0, 1, 3]);
  });

  describe("of run", () => {
    const args: ArgsDef = {
      ...TABLE,
      "num-backups": { type: "string", alias: "n" },
      optional: { type: "string" },
      wait: { type: "string" },
      verbosity: { type: "string" },
      "snapshot-prefix": { type: "string", alias: "p" },
      "latest-only": { type: "boolean" },
      "max-age": { type: "string" },
    };
    const options = (...words: string[]) => runOptions(readArguments(words, args));
    const level = log.level;
    afterAll(() => void (log.level = level));

    test("each destination has its policy; --latest-only is -N 1", () => {
      const { destinations, sourcePolicy } = options(
        "/a",
        "/b",
        "--optional",
        "/c",
        "-n",
        "7d",
        "--latest-only",
      );
      expect(
        destinations.map(({ location, optional, policy }) => [location.id, optional, policy?.text]),
      ).toEqual([
        ["/b", false, "7d"],
        ["/c", true, "7d"],
      ]);
      expect(sourcePolicy?.newest).toBe(1);
    });

    test.each<[string[], RegExp]>([
      [[], /SOURCE is missing/],
      [["shell://cat"], /cannot be a command/],
      [["/a", "-N", "x"], /retention policy/],
      [["/a", "-n", "7d 7d", "/b"], /twice/],
      [["/a", "--wait", "-1"], /wait/],
      [["/a", "--wait=1.5"], /whole number/],
      [["/a", "--verbosity", "loud"], /loud/],
      [["/a", "-p", "a/b"], /prefix/],
      [["/a", "-p", "a\nb"], /prefix/],
      [["/a", "-f", " "], /snapshot-folder/],
      [["/a", "--max-age", "soon"], /duration/],
    ])("%j is a usage error", (words, message) => {
      expect(() => options(...words)).toThrow(UsageError);
      expect(() => options(...words)).toThrow(message);
    });
  });
});

describe("options", () => {
  const program = readFileSync(join(import.meta.dir, "../btrfs-backup.ts"), "utf8");
  const [, behind = ""] = program.split("\nconst GROUPS = ");
  const readers = behind.slice(behind.indexOf("\n} as const satisfies "));
  test.each([...OPTIONS.keys()])("--%s is not only defined, but read", (name) =>
    expect(readers).toContain(`"${name}"`),
  );

  const given = (command: keyof typeof COMMANDS, ...words: string[]) =>
    readArguments(words, COMMANDS[command].args as ArgsDef);

  test("each command has those that the table gives it, in one group of its help", () => {
    for (const [name, command] of Object.entries(COMMANDS)) {
      const { groups } = manualOf(command);
      const options = [...OPTIONS].filter(([, { of }]) => of.some((one) => one === name));
      expect(groups.flatMap(([, some]) => some.map((option) => option.name)).toSorted()).toEqual(
        options.map(([option]) => option).toSorted(),
      );
    }
  });

  test("options of which one would not hold are refused together", () => {
    const table: [() => unknown, string | null][] = [
      [() => runOptions(given("run", "/a", "--latest-only", "-N", "7d")), "--latest-only is -N 1"],
      [() => runOptions(given("run", "/a", "--latest-only", "-N", "1")), null],
      [() => runOptions(given("run", "/a", "--recursive", "--exclude", "#x")), "excludes nothing"],
      [() => runOptions(given("run", "/a", "--recursive", "--exclude", " ")), "excludes nothing"],
      [() => runOptions(given("run", "/a", "--recursive", "--exclude", "\\#x")), null],
      [() => listOptions(given("list", "/a", "--max-age", "1d", "--size")), "--max-age and --size"],
      [() => listOptions(given("list", "/a", "--last", "3", "--max-age", "1d")), "and --last"],
    ];
    for (const [read, message] of table)
      if (message === null) read();
      else expect(read).toThrow(message);
  });

  test("an option that only other commands have is told with these", () => {
    const problem = (command: keyof typeof COMMANDS, ...words: string[]) => {
      try {
        given(command, ...words);
      } catch (error) {
        return (error as Error).message;
      }
      return "none";
    };
    expect([
      problem("drill", "--help-all"),
      problem("keep", "--dry-run", "/b", "x"),
      problem("run", "--get", "x", "/home/letter"),
      problem("restore", "-S", "/b", "/x"),
      problem("list", "--allow-read", "/b"),
      problem("list", "--sise", "/b"),
    ]).toEqual([
      "unknown option --help-all; --help tells all options of this command",
      "unknown option --dry-run; run, check, copy, prune, restore, all have it",
      "unknown option --get; versions has it",
      "unknown option -S; run, check have it",
      "unknown option --allow-read",
      "unknown option --sise; did you mean --size?",
    ]);
  });

  test("an empty value, as of a variable that nobody has set, is refused where it means nothing", () => {
    const accepted = new Set<string>();
    for (const [name, { of, value }] of OPTIONS)
      for (const command of value === undefined ? [] : of)
        try {
          readArguments([`--${name}=`], COMMANDS[command].args as ArgsDef);
          accepted.add(name);
        } catch (error) {
          expect(error).toBeInstanceOf(UsageError);
          expect((error as Error).message).toBe(
            `--${name} cannot be empty: give ${value}, or leave the option out`,
          );
        }
    expect([...accepted].sort()).toEqual(["note", "snapshot-folder", "snapshot-prefix"]);
  });

  test("--for names those that can stand behind it", () => {
    const { means, of: commands } = OPTIONS.get("for") as Option;
    for (const [name, option] of OPTIONS)
      if (option.perDest) {
        expect(means).toMatch(new RegExp(`--${name}\\b|-${option.short ?? name}\\b`));
        expect([...option.of]).toEqual(expect.arrayContaining([...commands]));
      }
    // Nothing else is named.
    const named = means.match(/ --?[a-z][a-z-]*/g) ?? [];
    expect(named.length).toBe([...OPTIONS.values()].filter(({ perDest }) => perDest).length);
  });

  test("an option behind --for DEST counts there, where it can, and everywhere else otherwise", () => {
    const given = readArguments(
      ["-n", "1", "--for", "/b", "-n", "2", "--jobs", "3", "--for", "/c", "/a"],
      COMMANDS.run.args as ArgsDef,
    );
    expect([given.value("num-backups"), given.value("jobs")]).toEqual(["1", "3"]);
    expect(
      given.scopes.map(({ dest, options }) => [
        dest,
        options.value("num-backups"),
        options.value("jobs"),
      ]),
    ).toEqual([
      ["/b", "2", "3"],
      ["/c", "1", "3"],
    ]);
  });
});

describe("argument files", () => {
  const files: Record<string, string> = {
    plain: "-q\n--num-snapshots 5\n/a\n",
    layout:
      "\n  # a comment\n\t-q  \n   --snapshot-prefix \t with  blanks inside \n#-S\n  /path with blanks  \n",
    crlf: "-q\r\n-N 5\r\n\r\n# comment\r\n/a\r\n",
    "no-end": "-q",
    empty: "",
    equals: "--num-snapshots=24h 7d\n",
    policy: "-N 24h 7d 4w\n",
    hash: "--snapshot-prefix # is mine\n/a#b\n",
    "etc/outer": "@inner\n/outer\n",
    "etc/inner": "@deeper/innermost\n",
    "etc/deeper/innermost": "@../up\n",
    "etc/up": "/up\n",
    "etc/absolute": "@/abs/file\n",
    "/abs/file": "@next\n",
    "/abs/next": "/next\n",
    twice: "@plain\n@plain\n",
    "loop/a": "@b\n",
    "loop/b": "  @./c\n",
    "loop/c": "@../loop/a\n",
    self: "@self\n",
    "missing-inside": "@nowhere\n",
  };
  const expand = (...args: string[]) =>
    expandFiles(args, (path) => {
      const text = files[path];
      if (text === undefined) throw new Error("ENOENT");
      return text;
    });
  test.each<[string, string[], string[]]>([
    ["one flag, option or positional a line", ["@plain"], ["-q", "--num-snapshots", "5", "/a"]],
    [
      "in its place among the others",
      ["-S", "@plain", "/b"],
      ["-S", "-q", "--num-snapshots", "5", "/a", "/b"],
    ],
    [
      "comments, blank lines and indentation; an option's value begins at the first blank",
      ["@layout"],
      ["-q", "--snapshot-prefix", "with  blanks inside", "/path with blanks"],
    ],
    ["a file from Windows", ["@crlf"], ["-q", "-N", "5", "/a"]],
    ["no line end at the end", ["@no-end"], ["-q"]],
    ["an empty file", ["@empty"], []],
    ["the rest of a line is one value", ["@policy"], ["-N", "24h 7d 4w"]],
    ["a # inside a line is no comment", ["@hash"], ["--snapshot-prefix", "# is mine", "/a#b"]],
    ["nested files stand relative to the one that names them", ["@etc/outer"], ["/up", "/outer"]],
    ["an absolute one as it is", ["@etc/absolute"], ["/next"]],
    [
      "the same file twice is no loop",
      ["@twice"],
      ["-q", "--num-snapshots", "5", "/a", "-q", "--num-snapshots", "5", "/a"],
    ],
    ["no file", ["-q", "user@host", "/a@b"], ["-q", "user@host", "/a@b"]],
  ])("%s", (_, args, expected) => expect(expand(...args)).toEqual(expected));

  test.each<[string, RegExp]>([
    ["@self", /self -> self/],
    ["@loop/a", /loop\/a -> loop\/b -> loop\/c -> loop\/a/],
    ["@nowhere", /nowhere.*ENOENT/],
    ["@missing-inside", /nowhere.*ENOENT/],
    ["@", /cannot read/],
  ])("%s is a usage error that names the files", (arg, message) => {
    expect(() => expand(arg)).toThrow(UsageError);
    expect(() => expand(arg)).toThrow(message);
  });
});

// The login shells that a word may meet on the other side.
const SHELLS: readonly (readonly string[])[] = [
  ["bash"],
  ["dash"],
  ["busybox", "ash"],
  ["fish", "--no-config"],
  ["tcsh", "-f"],
];

/** The words as a shell understood them. */
function understood(shell: readonly string[], command: string): string[] {
  const [program = "", ...options] = shell;
  const { stdout, stderr, status } = spawnSync(program, [...options, "-c", command], {
    env: { ...process.env, LC_ALL: "C.UTF-8" },
  });
  expect({ status, stderr: stderr.toString() }).toEqual({ status: 0, stderr: "" });
  return stdout.toString().split("\0").slice(0, -1);
}

describe.each(SHELLS.map((shell) => [shell.join(" "), shell] as const))(
  "quoting for %s",
  (name, shell) => {
    const forAll = name.startsWith("tcsh")
      ? (word: string) => !/[\n\r\0]/.test(word)
      : (word: string) => !word.includes("\0"); // csh cannot quote a line break

    test("any text is one word, and stays what it was", () => {
      const hostile = fc.string({
        unit: fc.constantFrom(..."'\"\\!`$(){}[]<>|&;*?~#^=%,:@+- \t\nabné😀"),
        maxLength: 30,
      });
      const word = fc
        .oneof(hostile, fc.string({ unit: "binary-ascii" }), fc.string({ unit: "grapheme" }))
        .filter(forAll);
      fc.assert(
        fc.property(fc.array(word, { minLength: 40, maxLength: 80 }), (words) => {
          expect(
            understood(shell, `/usr/bin/printf %s${quote("\\0")} ${words.map(quote).join(" ")}`),
          ).toEqual(words);
        }),
        { numRuns: 50 },
      );
    });

    test.each(
      [
        "",
        "'",
        "\\",
        "!",
        "!!",
        "\\'",
        "'\\''",
        "a\\",
        "$(touch /tmp/x)",
        "`id`",
        "; id",
        "-n",
        "--",
        "~",
        "*",
        "%s",
        "^a^b",
        "{a,b}",
        "\t",
        " ",
        "a\nb",
        "\\n",
        "é",
        "日本",
        "\u{1f600}",
      ].filter(forAll),
    )("%j", (word) => {
      expect(understood(shell, `/usr/bin/printf %s${quote("\\0")} ${quote(word)}`)).toEqual([word]);
    });

    test("a verb gets its arguments, and runs", () => {
      const verb: Verb = {
        name: "echo",
        script: `shift; for x; do printf %s "$x"; head -c 1 /dev/zero; done`,
      };
      const words = ["a b", "'", "\\", "!x", "$(id)", "-n", "", "é", "sudo"];
      expect(
        understood(shell, commandFor({ label: "", ssh: null, sudo: false, beat: 15 }, verb, words)),
      ).toEqual(words);
    });
  },
);

describe("commands for other hosts", () => {
  test("a dead link is noticed within a minute, or as the user says", () => {
    const ssh = (...sshOptions: string[]) =>
      hostOf({ user: null, name: "host", port: null }, { sshOptions, sudo: false, sshSudo: false });
    expect(ssh().ssh?.filter((word) => /Alive|Timeout/.test(word))).toEqual([
      "ServerAliveInterval=15",
      "ServerAliveCountMax=2",
      "ConnectTimeout=15",
    ]);
    // ssh takes the first value that it is given.
    expect(
      ssh("ConnectTimeout=99").ssh?.filter((word) => word.startsWith("ConnectTimeout"))[0],
    ).toBe("ConnectTimeout=99");
    expect([
      ssh().beat,
      ssh("ServerAliveInterval=60").beat,
      ssh("serveraliveinterval 7").beat,
      ssh("ServerAliveInterval=0").beat,
    ]).toEqual([15, 60, 7, 15]);
  });

  const host = {
    label: "me@host",
    ssh: ["ssh", "-o", "Port=22", "--", "host"],
    sudo: true,
    beat: 15,
  };
  const verb: Verb = { name: "try", script: "exit 0" };

  test("ssh gets one word, which the login shell over there takes apart", () => {
    expect(commandFor(host, verb, ["it's"])).toBe(
      ["ssh", "-o", "Port=22", "--", "host", `sh -c 'exit 0' 'btrfs-backup:try' 'sudo' 'it'\\''s'`]
        .map(quote)
        .join(" "),
    );
  });

  test.each(["a\nb", "a\rb"])(
    "%j is refused: not every login shell can quote a line break",
    (word) => {
      expect(() => commandFor(host, verb, [word])).toThrow(Failure);
      expect(commandFor({ ...host, ssh: null }, verb, [word])).toContain(word);
    },
  );
});

/** What bash makes of a script: the same text for all that mean the same. */
const understoodByBash = (script: string) =>
  spawnSync("bash", ["-c", `f() {\n${script}\n}; declare -f f`]).stdout.toString();

// What shellcheck says of scripts that are right, and why they are. What concerns one line stands there.
const EXCEPTIONS = {
  SC2034:
    "a parameter has a name, for those who call the verb, also where the script does not use it",
  SC2015: "`a && b || c`: c is what must happen if b is not so",
  SC3013: "`-ef`, which dash, ash and bash know, takes no process",
};

describe.each(VERBS.map((verb) => [verb.name, verb] as const))(
  "the verb %s",
  (_, { script, written, takes }) => {
    test("holds nothing that a login shell could trip over, and fits into one argument", () => {
      expect(script).not.toMatch(/['\\!\n\r\0]/);
      expect(Buffer.byteLength(script)).toBeLessThan(28 * 1024); // of 128 KiB, 100 are for values
    });
    test("means the same in one line as it is written", () => {
      expect(understoodByBash(script)).toBe(understoodByBash(written));
      expect(understoodByBash(script)).toStartWith("f () \n{");
    });
    test("keeps its parameters: no function that it shares with others has variables of those names", () => {
      const assigned = (text: string) =>
        [...text.matchAll(/(?:^|[\s;(])([a-z_]+)=|\bfor ([a-z_]+)|\bread -r ([a-z_ ]+)/g)].flatMap(
          ([, set, each, read = ""]) => [set ?? each ?? "", ...read.split(" ")],
        );
      const functions = [...written.matchAll(/^( *)[a-z_]+\(\) \{ ?\(?\n(.*?)\n\1[)}]/gms)]
        .map(([, , body = ""]) => body)
        .join("\n");
      expect(functions.includes("/proc/self/status")).toBe(takes !== "command"); // but for the user's own
      expect(
        parametersOf({ takes })
          .map(({ name }) => name)
          .filter((name) => assigned(functions).includes(name)),
      ).toEqual([]);
    });
    test.each(["bash --posix", "dash", "busybox ash"])("is a script that %s can read", (shell) => {
      const [program = "", ...options] = shell.split(" ");
      for (const text of [script, written])
        expect(spawnSync(program, [...options, "-n", "-c", text]).stderr.toString()).toBe("");
    });
    test("is one that shellcheck has nothing against", () => {
      const { status, stdout } = spawnSync(
        "shellcheck",
        ["-s", "sh", "-e", Object.keys(EXCEPTIONS).join(), "-"],
        { input: written },
      );
      expect([status, stdout.toString()]).toEqual([0, ""]);
    });
  },
);

describe("a script", () => {
  test.each<[string, string]>([
    ["a\n  b", "a; b"],
    ["# why\n\na\n  # and why\nb", "a; b"],
    ["if a; then\n  b\nelse\n  c\nfi\nd", "if a; then b; else c; fi; d"],
    ["f() {\n  a &&\n    b ||\n    c\n}\nf", "f() { a && b || c; }; f"],
    [
      "case $1 in\n  a) b;;\n  c)\n    d\n    e\n    ;;\nesac\nf",
      "case $1 in a) b;; c) d; e ;; esac; f",
    ],
    ["( cd x\n  y )\nz", "( cd x; y ); z"],
    ["(\n  a\n) |\n  b", "( a; ) | b"],
    ["x=$(a)\ny &\nz", "x=$(a); y & z"],
    ["while a; do\n  b\ndone <f\nc", "while a; do b; done <f; c"],
  ])("%j goes over the wire as %j", (written, line) => {
    expect(oneLine(written)).toBe(line);
    expect(understoodByBash(written)).toBe(understoodByBash(line));
  });

  test("that a login shell could trip over, or whose comment would hide what follows, is an error when the file is loaded", () => {
    const script = (text: string) => sh(Object.assign([text], { raw: [text] }));
    for (const fine of ["# it's fine!", 'a $# ${x#y} "${x##*/}"', "  # a"])
      expect(script(fine)).toBe(fine);
    for (const wrong of ["it's", "a\\b", "! a", "a # b", "a; #b", "a\n  'b'", "a &&\t# b"])
      expect(() => script(wrong)).toThrow("cannot hold");
  });

  test("gets its parameters by name, in their order; what may be left out ends with the last that is given", () => {
    const named = { takes: "a b? c?", name: "n", script: "", written: "" } as const;
    expect(wordsFor(named, { a: "1" })).toEqual(["1"]);
    expect(wordsFor(named, { c: "3", a: "1" })).toEqual(["1", "", "3"]);
    expect(
      wordsFor({ ...named, takes: "a names..." } as const, { a: "", names: ["x", "y"] }),
    ).toEqual(["", "x", "y"]);
    // @ts-expect-error one is missing
    expect(wordsFor(named, {})).toEqual([]);
    // @ts-expect-error one is misspelt
    wordsFor(named, { a: "1", bb: "2" });
  });
});

test.each<[string, boolean]>([
  ["20260101-000000", true],
  ["a b", true],
  ["...", true],
  [".x", true],
  ["\u00fc\u2603", true],
  ["", false],
  [".", false],
  ["..", false],
  ["a/b", false],
  ["/", false],
  ["a\0b", false],
  ["a\nb", false],
  ["a\rb", false],
])("%j is the name of an entry: %p", (text, isOne) =>
  expect(entryName(text)).toBe(isOne ? (text as EntryName) : null),
);

test.each<[string, string]>([
  ["fine \u00fc\n", "fine \u00fc\n"],
  ["\x1b]0;x\x07", "\\u001b]0;x\\u0007"],
  ["a\tb\rc", "a\\u0009b\\u000dc"],
  ["\x9b2J", "\\u009b2J"],
  ["\u202egpj.exe", "\\u202egpj.exe"],
])("%j is shown as %j", (text, shown) => expect(visible(text)).toBe(shown));

describe("gpg's keys that can encrypt", () => {
  const key = (validity: string, capabilities: string, fingerprint: string) =>
    `pub:${validity}:255:22:X:1:::u:::${capabilities}:::::ed25519:::0:\nfpr:::::::::${fingerprint}:\nuid:${validity}::::1::H::name <a@b>::::::::::0:\nsub:${validity}:255:18:Y:1::::::e::::::cv25519::\nfpr:::::::::${fingerprint}0:\n`;
  test.each<[string, string[]]>([
    ["", []],
    [key("-", "scESC", "A"), ["A"]],
    [key("u", "scESC", "A") + key("f", "ESC", "B"), ["A", "B"]],
    [key("e", "scSC", "A") + key("u", "scESC", "B"), ["B"]],
    [key("r", "scESC", "A"), []],
    [key("u", "scSC", "A"), []],
    [key("u", "scESCD", "A"), []],
  ])("in %j", (printed, fingerprints) => expect(usableKeys(printed)).toEqual(fingerprints));
});

test("nonsense from 0.3.1 is told at debug level only", () => {
  const debug = spyOn(log, "debug");
  parseOldRecord("hello");
  expect(debug).toHaveBeenCalledTimes(1);
  debug.mockRestore();
});

test("a place whose fsid has only decimal digits is on btrfs all the same", () => {
  // The UUID's first half is the fsid here, and the last two words are zero but for the root's ID.
  const uuid = "12345678-9012-3456-0000-000000000000";
  const [a, b, c, d] = [0x12345678, 0x90123456, 0, 0];
  const fsid = (((BigInt(a) ^ BigInt(c)) << 32n) | (BigInt(b) ^ BigInt(d))) ^ 0n;
  const section = (name: string, text: string) => `\nN ${name}\n${text}\n`;
  const listed = `ID 256 gen 7 cgen 7 top level 5 parent_uuid -${" ".repeat(35)} received_uuid -${" ".repeat(35)} uuid ${U(1)} path mnt`;
  const output =
    section("mounts", "44 27 0:41 /mnt /mnt rw - btrfs /dev/loop1 rw") +
    section("filesystems", uuid) +
    section("folder", "/mnt") +
    section("inodes", "256 0") +
    section("places", `${(fsid ^ 0x100n).toString(16)} 9123683e 10 4096`) +
    section("subvolumes", listed) +
    section("end", "");
  expect((fsid ^ 0x100n).toString(16)).toMatch(/^\d+$/);
  expect(parseInspection(output, "N", "/mnt").place).toMatchObject({
    path: "/mnt",
    inode: 256,
    filesystem: uuid,
    root: 256,
  });
});

describe("words", () => {
  test.each<[string, string | null]>([
    ["2024-03-01", "20240301-000000"],
    ["2024-03-01 10:15", "20240301-101500"],
    ["2024-03-01T10:15:59", "20240301-101559"],
    ["2024-02-30", null],
    ["2024-03-01 24:00", null],
    ["2024-3-1", null],
    ["yesterday", null],
    ["2024-03-01 10", null],
    ["", null],
  ])("the time %p", (text, name) =>
    name === null
      ? expect(() => parseWhen(text)).toThrow(UsageError)
      : expect(parseWhen(text)).toBe(parseName(name, "") as number),
  );

  test.each<[number, string]>([
    [-5, "0 seconds"],
    [0, "0 seconds"],
    [1999, "1 second"],
    [119e3, "119 seconds"],
    [120e3, "2 minutes"],
    [7199e3, "119 minutes"],
    [7200e3, "2 hours"],
    [47 * 3600e3, "47 hours"],
    [49 * 3600e3, "2 days"],
    [59 * 86400e3, "59 days"],
    [61 * 86400e3, "2 months"],
    [800 * 86400e3, "2 years"],
  ])("%d ms", (span, words) => expect(inWords(span)).toBe(words));

  test.each<[number, string]>([
    [0, "0B"],
    [1023, "1023B"],
    [1024, "1.0K"],
    [1536, "1.5K"],
    [2 ** 30, "1.0G"],
    [2 ** 60, "1024.0P"],
  ])("%d bytes", (bytes, words) => expect(inBytes(bytes)).toBe(words));

  test.each<[string, number | null]>([
    ["1", 1],
    ["100k", 102400],
    ["1.5M", 1572864],
    ["2g", 2 ** 31],
    ["0", null],
    ["0.5", null],
    ["-1", null],
    ["1t", null],
    ["fast", null],
    ["1 m", null],
    ["9999999999999g", null],
  ])("the rate %p", (text, rate) =>
    rate === null
      ? expect(() => parseRate(text)).toThrow(UsageError)
      : expect(parseRate(text)).toBe(rate),
  );

  test.each<[string, string | null]>([
    ["zstd", "3"],
    ["zstd:1", "1"],
    ["zstd:19", "19"],
    ["zstd:20", null],
    ["zstd:0", null],
    ["zstd:", null],
    ["gzip", null],
  ])("the compression %p", (text, level) =>
    level === null
      ? expect(() => parseCompression(text)).toThrow(UsageError)
      : expect(parseCompression(text)).toBe(level),
  );

  test("a table has columns as wide as their widest cell, and no blanks at the end", () =>
    expect(
      alignedTable([
        ["a", "bb", ""],
        ["ccc", "d", "e"],
      ]),
    ).toBe("a    bb\nccc  d   e\n"));
});

describe("what a tree holds", () => {
  const words = (
    path: string,
    mode: string,
    inode: string,
    rest: { size?: string; mtime?: string; device?: string; shown?: string } = {},
  ) => [
    path,
    mode,
    "0:5",
    rest.size ?? "7",
    rest.mtime ?? "-5.000000001",
    rest.device ?? "0:0",
    inode,
    rest.shown ?? `'${path}'`,
  ];
  const file = words("./a", "81a4", "300");

  test("of each type what a stream carries of it", () => {
    const all = [
      file,
      words("./l", "a1ff", "301", { shown: "'./l' -> 'to -> there'" }),
      words("./d", "41ed", "302"),
      words("./c", "21b6", "303", { device: "1:3" }),
      words("./p", "11a4", "304"),
      words("./s", "c1ed", "305"),
    ].flat();
    expect(
      parseStats(all).map(({ path, state }) => [
        path,
        state.type,
        state.mode,
        state.size,
        state.target,
        state.device,
      ]),
    ).toEqual([
      ["./a", "file", "644", "7", undefined, undefined],
      ["./l", "symbolic link", "777", undefined, "'to -> there'", undefined],
      ["./d", "directory", "755", undefined, undefined, undefined],
      ["./c", "character device", "666", undefined, undefined, "1:3"],
      ["./p", "fifo", "644", undefined, undefined, undefined],
      ["./s", "socket", "755", undefined, undefined, undefined],
    ]);
  });

  test("anything else is an error", () => {
    for (const bad of [["x"], file.slice(1), [...file, "more"]])
      expect(() => parseStats(bad)).toThrow(Failure);
  });

  test("hard links, contents and attributes are told by path, whatever is in the path", () => {
    const [name, escaped] = ["./b\nc\\ ", "b\\012c\\134 "];
    const text =
      [words(".", "41ed", "256"), file, words(name, "81a4", "300")].flat().join("\0") +
      "\0\0" +
      [`${"0".repeat(64)}  ./a`, `${"1".repeat(64)}  ${name}`].join("\0") +
      `\0\0# file: a\nuser.y=0x02\nuser.x=0x01\n\n# file: ${escaped}\nuser.z=0x03\n\n`;
    const listing = parseListing(text);
    expect([...listing.keys()]).toEqual([".", "./a", name]);
    expect(listing.get(".")).not.toHaveProperty("mtime");
    expect(listing.get("./a")).toMatchObject({
      contents: "0".repeat(64),
      attributes: "user.x=0x01 user.y=0x02",
      mtime: "-5.000000001",
    });
    expect(listing.get(name)).toMatchObject({
      "hard link to": "./a",
      contents: "1".repeat(64),
      attributes: "user.z=0x03",
    });
  });
});

test("a line about a stream fits the terminal, whatever it is called and however much is known", () => {
  const MiB = 1 << 20;
  for (const columns of [80, 120, 200])
    for (const size of [undefined, 0, 100 * MiB])
      for (const what of ["short", `20260101-120000 to ssh://root@${"server".repeat(30)}/backup`]) {
        const line = progressLine({ name: what, bytes: 50 * MiB, size, seconds: 10, columns });
        expect(line.length).toBeLessThan(columns);
        expect(line).toContain("0:00:10");
        expect(line.startsWith(what.slice(0, 5))).toBe(true);
      }
  // Where it goes can be read at 80 columns, whatever else is to be told.
  const name = "20260101-120000 to /mnt/usb/home";
  expect(
    progressLine({ name, bytes: 50 * MiB, size: 100 * MiB, seconds: 10, columns: 80 }),
  ).toMatch(/^2026.*…0* to \/mnt\/usb\/home .* ==> +50% 0:00:10 left$/);
  expect(progressNews({ name, bytes: 50 * MiB, size: 200 * MiB, seconds: 600 })).toBe(
    `${name}: 50.0M in 0:10:00, 85.3K/s; 25 % of some 200.0M, 0:30:00 left`,
  );
  expect(progressNews({ name, bytes: 0, size: undefined, seconds: 0 })).toBe(
    `${name}: 0B in 0:00:00, 0B/s`,
  );
  expect(
    progressLine({ name: "a", bytes: 50 * MiB, size: 100 * MiB, seconds: 10, columns: 120 }),
  ).toContain(" 50% 0:00:10 left");
  expect(
    progressLine({ name: "a", bytes: 0, size: 100 * MiB, seconds: 0, columns: 120 }),
  ).toContain("  0% 0:00:00 left");
  expect(
    progressLine({ name: "a", bytes: 200 * MiB, size: 100 * MiB, seconds: 10, columns: 120 }),
  ).toContain(" 100% 0:00:00 left");
});

test("a verify says every ten minutes how far it is, and in the end how many are well", () => {
  const [GiB, minute] = [2 ** 30, 60e3];
  const told = new Verification(0);
  told.begin("raw:///x", 3, 4 * GiB, 0);
  told.done(true, GiB);
  told.reading(GiB / 2);
  expect(told.line(80, 60e3)).toMatch(/^1 of 3 in .*1\.5G .* 37% 0:01:40 left$/);
  expect(told.line(80, 60e3).length).toBeLessThan(80);
  expect(told.news(10 * minute - 1)).toBeNull();
  expect(told.news(10 * minute)).toBe("Read 1 of 3 in raw:///x, 1.5G of 4.0G in 10 minutes");
  expect(told.news(19 * minute)).toBeNull();
  told.done(false, 3 * GiB);
  expect(told.news(20 * minute)).toBe("Read 2 of 3 in raw:///x, 4.0G of 4.0G in 20 minutes");
  told.done(true, 0);
  told.begin("/b", 1, 0, 20 * minute);
  expect(told.line(80, 20 * minute)).toStartWith("0 of 1 in /b");
  told.done(true, GiB);
  expect(told.summary(120 * minute)).toBe("3 of 4 are well, 5.0G in 2 hours");
});

test("a verb is shown as a person would type it", () => {
  const verb = {
    name: "look",
    takes: "folder fsid how? names...",
    written: "",
    script: "",
  } as const;
  const names = Array.from({ length: 12 }, (_, i) => `n${i}`);
  expect(
    typedVerb({ label: "nas" }, verb, { folder: "/a b", fsid: "1", names: ["x", "y z"] }),
  ).toBe("nas: look folder='/a b' fsid=1 names=(x 'y z')");
  expect(typedVerb({ label: "" }, verb, { folder: "/a", fsid: "", names })).toBe(
    `look folder=/a names=(${names.slice(0, 10).join(" ")} … 12 in all)`,
  );
  expect(typedVerb({ label: "" }, verb, { folder: "/a", fsid: "1", names: [] })).toBe(
    "look folder=/a fsid=1",
  );
});

/** The figures of a place; what is not named is nothing. */
const place = (more: Partial<Figures>): Figures => ({
  sent: 0,
  bytes: 0,
  seconds: 0,
  deleted: 0,
  errors: 0,
  kept: null,
  last: null,
  free: null,
  why: null,
  ...more,
});

test("the summary has a line for each place, the source first", () => {
  const text = summaryOf(
    "/home",
    new Map<string | null, Figures>([
      [
        "/backup",
        place({ sent: 2, bytes: 3 << 20, seconds: 1.26, deleted: 1, kept: 7, free: 2 ** 30 }),
      ],
      [null, place({ kept: 3 })],
      ["shell://cat", place({ errors: 1 })],
      ["/lost", place({ errors: 2, why: "/lost: no such directory\nand more" })],
    ]),
  );
  expect(text.split("\n").map((line) => line.trim().split(/ {2,}/))).toEqual([
    ["sent", "bytes", "time", "deleted", "kept", "free"],
    ["/home", "0.0 s", "0", "3"],
    ["/backup", "2", "3.0M", "1.3 s", "1", "7", "1.0G"],
    ["shell://cat", "0", "0B", "0.0 s", "0", "failed"],
    ["/lost", "0", "0B", "0.0 s", "0", "failed: no such directory"],
  ]);
});

test("metrics of several runs have each label once: the collector refuses a file that has one twice", () => {
  const run = (source: string, id: string, more: Partial<Figures>, now: number) => ({
    source,
    now,
    places: new Map<string | null, Figures>([
      [null, place({ seconds: 1, kept: 3 })],
      [id, place(more)],
    ]),
  });
  const text = metricsOfAll([
    run("/home", "/a", { bytes: 1, kept: 5, last: "2026-01-01T00:00:00Z" }, 2000),
    run("/home", "/a", { bytes: 2, errors: 1, last: null }, 3000),
    run("/home", "/b", { bytes: 4, free: 9 }, 1000),
    run("/srv", "/a", { bytes: 8 }, 1000),
  ]);
  const samples = text.split("\n").filter((line) => line !== "" && !line.startsWith("#"));
  const labels = samples.map((line) => line.slice(0, line.lastIndexOf(" ")));
  expect(new Set(labels).size).toBe(labels.length);
  for (const line of [
    'btrfs_backup_sent_bytes{source="/home",destination="/a"} 3',
    'btrfs_backup_errors{source="/home",destination="/a"} 1',
    'btrfs_backup_snapshots{source="/home",destination="/a"} 5',
    'btrfs_backup_last_success_timestamp_seconds{source="/home",destination="/a"} 1767225600',
    'btrfs_backup_last_run_timestamp_seconds{source="/home"} 3',
    'btrfs_backup_duration_seconds{source="/home"} 3',
    'btrfs_backup_sent_bytes{source="/home",destination="/b"} 4',
    'btrfs_backup_free_bytes{source="/home",destination="/b"} 9',
    'btrfs_backup_sent_bytes{source="/srv",destination="/a"} 8',
  ])
    expect(samples).toContain(line);
  expect(text.match(/^# HELP/gm)?.length).toBe(7);
});

test("a drill's metrics keep the time of the last good one, and what other drills said", () => {
  const of = (
    before: string,
    source: string | null,
    destination: string,
    isGood: boolean,
    now: number,
  ) => metricsOfDrills(before, { source, destination, isGood, now });
  const lines = (text: string) =>
    text.split("\n").filter((line) => line !== "" && !line.startsWith("#"));
  const first = of("", "/home", "/b/home", true, 5000);
  const second = of(first, "/home", 'raw:///x"y', false, 6000);
  // What is not known of the source where nothing could be opened is what it was.
  const third = of(second, null, "/b/home", false, 7000);
  expect(lines(third)).toEqual([
    'btrfs_backup_drill_timestamp_seconds{source="/home",destination="/b/home"} 5',
    'btrfs_backup_drill_timestamp_seconds{source="/home",destination="raw:///x\\"y"} 0',
    'btrfs_backup_drill_success{source="/home",destination="/b/home"} 0',
    'btrfs_backup_drill_success{source="/home",destination="raw:///x\\"y"} 0',
  ]);
  expect(() => of('btrfs_backup_errors{source="/home"} 0\n', "/home", "/b", true, 1)).toThrow(
    "other metrics",
  );
});

test("an error of an argument file is told with the line that it is about", () => {
  const lineOf = (...lines: string[]) => {
    const placed = lines.flatMap((line, i) =>
      (/^(-\S*) (.*)$/.exec(line)?.slice(1) ?? [line]).map((word) => ({
        word,
        file: "f",
        line: i + 1,
      })),
    );
    const parse = (words: readonly string[]) =>
      runOptions(readArguments(words, COMMANDS.run.args as ArgsDef));
    let message = "";
    try {
      parse(placed.map(({ word }) => word));
    } catch (error) {
      ({ message } = error as Error);
    }
    expect(message).not.toBe("");
    return culpritOf(placed, parse, message)?.line ?? null;
  };
  const table: [number | null, string[]][] = [
    [2, ["/home", "--nonsense", "/backup"]],
    [1, ["-N many", "/home", "/backup"]],
    [1, ["-N many", "/home"]],
    [3, ["/home", "/backup", "--wait soon"]],
    [3, ["/home", "-n 3", "s3://bucket"]],
    [1, ["shell://cat"]],
    [3, ["/home", "-N 3", "-n"]],
    // The second of two that contradict each other; the first of two errors, which is the one that is told.
    [3, ["/home", "--keep-unsent", "--drop-unsent"]],
    [2, ["/home", "-N many", "--wait soon"]],
    // A value that is missing takes the next line for it.
    [1, ["--compress", "/home", "/backup"]],
    // What is missing stands in no line.
    [null, ["-N 3"]],
  ];
  for (const [line, lines] of table) expect([lines, lineOf(...lines)]).toEqual([lines, line]);
});

test("errors are followed by the next command where there is one to name", () => {
  const table: [string, string | null][] = [
    [
      "ssh://root@nas:22/b: No ED25519 host key is known\nHost key verification failed.",
      "log in once as the user of this run, and compare the key: ssh -p 22 root@nas",
    ],
    [
      "ssh://nas/b: root@nas: Permission denied (publickey,password).",
      "give it the key of the user of this run: ssh-copy-id nas; or name another key: --ssh-opt IdentityFile=FILE",
    ],
    [
      "/a b/c: no such directory: /a b (is the disk mounted?)",
      "see which filesystem is there: findmnt -T '/a b'; if it is the right one: mkdir -p '/a b'",
    ],
    // Another host may have said all of it.
    [
      "/a: ssh://$(reboot)/b: Host key verification failed.",
      "log in once as the user of this run, and compare the key: ssh '$(reboot)'",
    ],
    ["/a: Permission denied", null],
    ["ssh://nas/b: Connection refused", null],
    ["/a: no such directory: /b (--to names another place)", null],
  ];
  for (const [message, advice] of table)
    expect([message, adviceOn(message)]).toEqual([message, advice]);
});

test("a directory that is no subvolume is told which one it lies in", () => {
  const all = ["@home", "@home/ann", "@homes"].map((path) => ({ path }));
  const around = (path: string, top: string) =>
    /^(?:; it is a directory in the subvolume (.*?))?\. Back up/.exec(
      subvolumeAround({ path, top }, all),
    )?.[1];
  expect(around("/home/bob", "/@home/bob")).toBe("/home");
  expect(around("/home/ann/x/y", "/@home/ann/x/y")).toBe("/home/ann");
  expect(around("/mnt/x", "/x")).toBe("/mnt");
  expect(around("/x", "/x")).toBe("/");
  // Mounted elsewhere by a bind, its path says nothing of the subvolume's.
  expect(around("/srv/x", "/@home/bob")).toBe(undefined);
});

test("mounts in a circle, which only a host that lies prints, do not keep anybody walking", () => {
  const mounts = parseMounts(
    [
      "1 0 0:1 / / rw - btrfs a rw",
      "2 1 0:2 / /b rw - btrfs b rw",
      "1 2 0:3 / /b/c rw - btrfs c rw",
    ].join("\n"),
  );
  expect(placeOn(mounts, "/b/c/d").mount.path).toMatch(/^\/b/);
});

test("folders with snapshots below one that is named too high", () => {
  const subvolumes = [
    "b/home/20260101-000000",
    "b/home/20260102-000000",
    "b/deep/er/x-20260101-000000",
    "b/20260101-000000",
    "c/20260101-000000",
    "b/other",
  ].map((path) => ({ path }) as Subvolume);
  expect(foldersBelow({ top: "/b", path: "/mnt/b", subvolumes })).toEqual([
    "/mnt/b/home",
    "/mnt/b/deep/er",
  ]);
  expect(foldersBelow({ top: "/", path: "/mnt", subvolumes })).toEqual([
    "/mnt/b/home",
    "/mnt/b/deep/er",
    "/mnt/b",
    "/mnt/c",
  ]);
});

test("each section uses only those above it, but for what is named here", () => {
  const program = readFileSync(join(import.meta.dir, "../btrfs-backup.ts"), "utf8");
  const sections = [...program.matchAll(/^\/\/ ── (\d+)\. /gm)].map(({ index }) => index).slice(1);
  const directory = mkdtempSync(join(import.meta.dir, "../node_modules/.sections-"));
  try {
    const files = sections.map((_, i) => join(directory, `${i + 1}.ts`));
    for (const [i, file] of files.entries()) writeFileSync(file, program.slice(0, sections[i]));
    const { stdout } = spawnSync(
      join(import.meta.dir, "../node_modules/.bin/tsc"),
      [
        ..."--noEmit --ignoreConfig --strict --exactOptionalPropertyTypes --skipLibCheck".split(
          " ",
        ),
        ..."--target esnext --module esnext --moduleResolution bundler --types bun-types".split(
          " ",
        ),
        ...files,
      ],
      { encoding: "utf8" },
    );
    const missing = [...stdout.matchAll(/Cannot find name '(\w+)'/g)].map(([, name]) => name);
    const allowed = [
      // It begins before anything else of the program is loaded.
      "relay",
      "Relay",
      // A verb that is asked by what runs verbs.
      "PROGRESS",
      // The check of a stream stands with the rest of the boundary that a key meets.
      "Checking",
      "expecting",
      "refuse",
      "streamCheck",
      "streamCommands",
      // The options of a command are what their readers return.
      ...[
        "copy",
        "drill",
        "guard",
        "list",
        "prune",
        "restore",
        "run",
        "setup",
        "verify",
        "versions",
      ].map((command) => `${command}Options`),
    ];
    expect([...new Set(missing)].sort()).toEqual(allowed.sort());
  } finally {
    rmSync(directory, { recursive: true });
  }
}, 60_000);

test("the map at the top names functions and sections that are there", () => {
  const program = readFileSync(join(import.meta.dir, "../btrfs-backup.ts"), "utf8");
  const [map = "", rest = ""] =
    program.split(/^\/\/ ── A map .*$/m)[1]?.split(/\n\n(?=\/\*\*)/s) ?? [];
  const [, ...named] = map.match(/`\w+`/g) ?? [];
  expect(named.length).toBeGreaterThan(15);
  for (const name of named)
    expect(program).toMatch(
      new RegExp(`^(export )?(async )?function ${name.slice(1, -1)}\\b`, "m"),
    );
  const listed = [...map.matchAll(/^\/\/ +(\d+)\. ([A-Z][a-z]+(?: line)?)  /gm)].map((m) =>
    m.slice(1, 3),
  );
  const banners = [...program.matchAll(/^\/\/ ── (\d+)\. (.*?) ─/gm)].map((m) => m.slice(1, 3));
  expect(banners).toHaveLength(10);
  expect(listed).toEqual(banners);
  expect(rest).not.toBe("");
});

test("the program calls the filesystem itself only for what is its own: what a location leads to can hang, and a verb answers for it", () => {
  const [program = ""] = readFileSync(join(import.meta.dir, "../btrfs-backup.ts"), "utf8").split(
    "\n// ── 9. Guard ",
  );
  // On a server, a guarded key's paths are looked at before anything is run.
  const whole = readFileSync(join(import.meta.dir, "../btrfs-backup.ts"), "utf8").replace(
    /\n\/\/ ── 9\. Guard (.|\n)*(?=\n\/\/ ── 10\. )/,
    "",
  );
  const imported =
    /import \{([^}]*)\} from "node:fs";/
      .exec(program)?.[1]
      ?.split(",")
      .map((name) => name.trim()) ?? [];
  expect(imported).toContain("readFileSync");
  const calls = new RegExp(
    `\\b(${imported.filter((name) => !["", "constants"].includes(name)).join("|")})\\(`,
    "g",
  );
  const found = new Map<string, Set<string>>();
  let where = "";
  for (const line of whole.split("\n")) {
    where =
      /^(?:export )?(?:async )?(?:function|const|class|let) (\w+)/.exec(line)?.[1] ??
      (line.startsWith("process.on") ? "at exit" : where);
    for (const [, call = ""] of line.matchAll(calls))
      found.set(where, (found.get(where) ?? new Set()).add(call));
  }
  const own = [
    // The configuration, which argument files on the command line are as well (main).
    "argumentFilesIn",
    "argumentText",
    "needUnchanged",
    // The manual, beside the source.
    "manualFiles",
    "at exit",
    "canEnter",
    "clearDead",
    "fanOut",
    "startPipeline",
    "openIfRead",
    "main",
    "openOutlet",
    "openOutputs",
    "outcomeOf",
    "passOn",
    "readIfThere",
    "readSome",
    "relay",
    "runtimeDirectory",
    "stopOnSignals",
    "writeAll",
  ];
  expect([...found.keys()].sort()).toEqual([...own].sort());
});
