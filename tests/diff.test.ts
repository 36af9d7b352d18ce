// What changed between two snapshots, and how many bytes that cost: as btrfs send tells it.

import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { attribute, command, stream } from "./support/stream.ts";
import {
  events,
  expectRun,
  filesystem,
  nextSecond,
  pair,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  waitFor,
  type Result,
} from "./support/rig.ts";
import { seeded, soak } from "./support/random.ts";
import { killAll } from "./support/processes.ts";
import { day, numberedUuid } from "./support/names.ts";
import {
  areComparable,
  byDirectory,
  comparedIn,
  differenceReader,
  Failure,
  largestOf,
  type Subvolume,
} from "../btrfs-backup.ts";

/** What `--json` told, a line a path. */
const told = (result: Result) =>
  events(result)
    .filter(({ event }) => event === "difference")
    .map(
      ({ what, from, path, bytes, shared }) =>
        `${what} ${from === undefined ? "" : `${from} > `}${path} ${bytes}${shared ? `+${shared}` : ""}`,
    );
const totals = (result: Result) => events(result).at(-1) as Record<string, any>;
const hidden = (folder: string) =>
  readdirSync(folder).filter((name) => name.startsWith(".btrfs-backup.diff-"));

describe("a stream of a difference", () => {
  const { path, pathTo, pathLink, size, offset, uuid, ctransid, cloneUuid, cloneCtransid } =
    attribute;
  const PARENT = numberedUuid(1);
  const frame = command(
    "snapshot",
    path("s"),
    uuid(numberedUuid(2)),
    ctransid(7),
    cloneUuid(PARENT),
    cloneCtransid(5),
  );
  type Name = Parameters<typeof command>[0];
  const on = (name: Name, where: string) => command(name, path(where));
  const rename = (from: string, to: string) => command("rename", path(from), pathTo(to));
  const link = (new_: string, old: string) => command("link", path(new_), pathLink(old));
  const wrote = (where: string, bytes: number) => command(22, path(where), offset(0), size(bytes));
  const shared = (where: string, bytes: number) =>
    command("clone", path(where), offset(0), attribute.cloneLength(bytes));

  const read = (bytes: Buffer, piece = bytes.length) => {
    const reader = differenceReader(PARENT);
    for (let i = 0; i < bytes.length; i += piece) reader.feed(bytes.subarray(i, i + piece));
    return reader
      .finish()
      .map(
        ({ what, from, path: to, bytes: written, shared: free }) =>
          `${what} ${from === null ? "" : `${from} > `}${to} ${written}${free ? `+${free}` : ""}`,
      );
  };
  const of = (...commands: Buffer[]) => read(stream(frame, ...commands, command("end")));

  test.each<[string, Buffer[], string[]]>([
    ["nothing", [], []],
    [
      "a file in a directory that gets another name later",
      [wrote("a/f", 5), rename("a", "b"), on("utimes", "")],
      ["renamed a > b 0", "changed b/f 5"],
    ],
    [
      "a name on the way",
      [
        on("mkfile", "o257-9-0"),
        rename("o257-9-0", "d/new"),
        wrote("d/new", 7),
        on("chmod", "d/new"),
        on("utimes", "d"),
      ],
      ["added d/new 7"],
    ],
    ["a file that is gone", [on("unlink", "d/x"), on("utimes", "d")], ["removed d/x 0"]],
    [
      "a directory that is gone, by a name on the way",
      [
        rename("d", "o260-7-0"),
        on("unlink", "o260-7-0/x"),
        on("rmdir", "o260-7-0"),
        on("utimes", ""),
      ],
      ["removed d 0", "removed d/x 0"],
    ],
    [
      "another file by the same name",
      [on("unlink", "f"), on("mkfile", "o300-9-0"), rename("o300-9-0", "f"), wrote("f", 3)],
      ["changed f 3"],
    ],
    [
      "a rename by a second name",
      [link("b", "a"), on("unlink", "a"), on("utimes", "b"), wrote("b", 2)],
      ["renamed a > b 2"],
    ],
    ["a second name", [link("b", "a"), on("utimes", "b")], ["added b 0"]],
    [
      "two names that are exchanged",
      [rename("b", "o258-6-0"), rename("a", "b"), rename("o258-6-0", "a")],
      ["renamed b > a 0", "renamed a > b 0"],
    ],
    ["a name that comes back after all", [rename("a", "o258-6-0"), rename("o258-6-0", "a")], []],
    [
      "a file that took another's place",
      [on("unlink", "f"), link("f", "tmp"), on("unlink", "tmp")],
      ["renamed tmp > f 0"],
    ],
    [
      "a new file of two names is written once",
      [on("mkfile", "o300-9-0"), rename("o300-9-0", "b"), link("a", "b"), wrote("b", 9)],
      ["added a 9", "added b 0"],
    ],
    [
      "what was made and taken away again",
      [on("mkfile", "o300-9-0"), on("unlink", "o300-9-0")],
      [],
    ],
    ["times of a file, and of a directory by itself", [on("utimes", "f")], ["changed f 0"]],
    ["attributes of the top", [on("chmod", "")], ["changed  0"]],
    ["what costs nothing", [shared("f", 4096), wrote("f", 1)], ["changed f 1+4096"]],
    [
      "this program's own files",
      [
        on("unlink", "s/.btrfs-backup.json"),
        on("mkfile", "o9-9-0"),
        rename("o9-9-0", "s/.btrfs-backup.json"),
        on("utimes", "s"),
      ],
      [],
    ],
    [
      "everything by path, as bytes",
      [on("chmod", "b"), on("chmod", "\xff"), on("chmod", "a/b"), on("chmod", "a-b")],
      ["changed a-b 0", "changed a/b 0", "changed b 0", "changed \xff 0"],
    ],
  ])("%s", (_, commands, expected) => {
    expect(of(...commands)).toEqual(expected);
    // It comes in pieces of any size.
    const bytes = stream(frame, ...commands, command("end"));
    for (const piece of [1, 7, 64]) expect(read(bytes, piece)).toEqual(expected);
  });

  test.each<[string, Buffer, string]>([
    ["no stream", Buffer.from("x".repeat(40)), "unknown"],
    ["no end", stream(frame, on("chmod", "f")), "early"],
    ["half a command", stream(frame, on("chmod", "f")).subarray(0, -2), "early"],
    ["something behind the end", stream(frame, command("end"), on("chmod", "f")), "unknown"],
    ["an unknown command", stream(frame, on(99, "f"), command("end")), "unknown"],
    [
      "a command longer than any",
      Buffer.concat([stream(frame), Buffer.from([0, 0, 2, 0, 18, 0, 0, 0, 0, 0])]),
      "unknown",
    ],
    [
      "a whole subvolume",
      stream(command("subvol", path("s"), uuid(PARENT), ctransid(7)), command("end")),
      "unknown",
    ],
    [
      "another parent",
      stream(
        command(
          "snapshot",
          path("s"),
          uuid(PARENT),
          ctransid(7),
          cloneUuid(numberedUuid(3)),
          cloneCtransid(5),
        ),
        command("end"),
      ),
      "another subvolume",
    ],
    [
      "a name that is not there",
      stream(frame, on("mkdir", "d"), on("chmod", "d/f"), command("end")),
      "not there",
    ],
    ["no path", stream(frame, command("chmod"), command("end")), "left something out"],
  ])("%s is an error", (_, bytes, why) => {
    expect(() => read(bytes)).toThrow(why);
    expect(() => read(bytes)).toThrow(Failure);
  });

  test("sums of directories, the most bytes first; what has less than a hundredth is left out", () => {
    const one = (where: string, bytes: number) =>
      ({ what: "changed", path: where, from: null, bytes, shared: 0 }) as const;
    const many = Array.from({ length: 300 }, (_, i) => one(`many/${i}`, 0));
    const sums = byDirectory([
      one("", 1),
      one("a/b/x", 1000),
      one("a/y", 5),
      one("c/z", 6),
      ...many,
    ]);
    expect(sums.map((sum) => `${sum.path} ${sum.bytes} ${sum.paths}`)).toEqual([
      " 1012 304",
      "a 1005 2",
      "a/b 1000 1",
      "c 6 1",
      "many 0 300",
    ]);
    expect(largestOf(sums).map((sum) => sum.path)).toEqual(["", "a", "a/b", "many"]);
    expect(largestOf([])).toEqual([]);
  });
});

test("which snapshots can be compared, and which are left of an interrupted diff", () => {
  const one = (n: number, parent: number | null, received: number | null = null): Subvolume => ({
    id: n,
    path: `s/${n}`,
    uuid: numberedUuid(n),
    parentUuid: parent === null ? null : numberedUuid(parent),
    receivedUuid: received === null ? null : numberedUuid(received),
    readonly: true,
  });
  const judge = (a: Subvolume, b: Subvolume, ...others: Subvolume[]) =>
    areComparable(a, b, {
      all: new Map([a, b, ...others].map((each) => [each.uuid, each])),
      ctransids: new Map(),
      births: new Map(),
      losses: new Map(),
    });
  expect(judge(one(2, 1), one(3, 1))).toBe(true); // of one subvolume, which may be gone
  expect(judge(one(2, 1), one(4, 3), one(3, 2))).toBe(true); // its source was made from the other
  expect(judge(one(2, 1), one(4, 3))).toBe(false);
  expect(judge(one(2, null), one(4, null))).toBe(false);
  expect(judge(one(2, null, 9), one(3, 2, 8))).toBe(true); // received on top of the other
  expect(judge(one(2, null, 9), one(3, null, 8))).toBe(false); // each in full
  const name = ".btrfs-backup.diff-0123456789abcdef";
  const standing = (each: string, readonly = true, receivedUuid: string | null = null) => ({
    name: each as never,
    readonly,
    receivedUuid,
  });
  expect(
    comparedIn([
      standing(name),
      standing(name, false),
      standing(name, true, numberedUuid(1)),
      standing(`${name}0`),
      standing(`x${name}`),
      standing(".btrfs-backup.diff-0123456789ABCDEF"),
      standing(day(1)),
    ]),
  ).toEqual([name as never]);
});

test("what was added, removed, changed and renamed, at a source and its backups, also over ssh", async () => {
  const { source, snapshots, destination } = pair();
  sh(
    `cd "$1"; mkdir -p a/b logs; head -c 8192 /dev/urandom >a/b/file; head -c 40960 /dev/urandom >big; echo 1 >logs/log; echo x >gone; echo x >moved
    ln gone a/linked; mkdir old; echo y >old/kept; echo z >old/edited; echo c >conf; printf 'x' >$'odd\\nname'; touch -d @1 $'bytes\\xff'; sync`,
    source,
  );
  await expectRun(0, [source, destination]);
  const [first = ""] = snapshotNames(snapshots);
  sh(
    `cd "$1"; head -c 4096 /dev/urandom | dd of=a/b/file bs=4096 seek=1 conv=notrunc status=none; cp --reflink=always big copy; rm gone a/linked
    mv moved a/arrived; mv logs/log logs/log.1; head -c 12288 /dev/urandom >logs/log; mv old renamed; head -c 100 /dev/urandom >renamed/edited
    echo other >conf.tmp; mv conf.tmp conf; chmod 600 plain/4; setfattr -n user.x -v y plain/5; mkdir empty/new; ln -s x empty/new/link
    printf 'yz' >$'odd\\nname'; touch $'bytes\\xff'; sync`,
    source,
  );
  const now = await expectRun(0, ["diff", "--json", source]);
  const expected = [
    "added copy 0+40960",
    "added empty/new 0",
    "added empty/new/link 0",
    "added logs/log 12288",
    "changed a/b/file 4096",
    "changed bytes\ufffd 0",
    "changed conf 6",
    "changed odd\nname 2",
    "changed plain/4 0",
    "changed plain/5 0",
    "changed renamed/edited 100",
    "removed a/linked 0",
    "removed gone 0",
    "renamed logs/log > logs/log.1 0",
    "renamed moved > a/arrived 0",
    "renamed old > renamed 0",
  ];
  expect(told(now).sort()).toEqual(expected);
  expect(events(now).find(({ path }) => path === "bytes\ufffd")?.["raw"]).toBe(
    Buffer.from("bytes\xff", "latin1").toString("base64"),
  );
  expect(totals(now)).toMatchObject({
    event: "summary",
    ok: true,
    from: first,
    to: "now",
    added: 4,
    removed: 2,
    changed: 7,
    renamed: 3,
    bytes: 16492,
    shared: 40960,
  });
  // Nothing of it stays, and nothing was changed.
  expect(hidden(snapshots)).toEqual([]);
  expect([...subvolumes(snapshots).keys()]).toEqual([first]);
  await nextSecond();
  await expectRun(0, [source, destination]);
  const [, second = ""] = snapshotNames(snapshots);
  const { url, options } = await sshServer();
  for (const place of [
    [source],
    [destination],
    [...options, url(source)],
    [...options, url(destination)],
  ])
    expect(told(await expectRun(0, ["diff", "--json", ...place, first, second])).sort()).toEqual(
      expected,
    );
  // The other way round, and to be read: by path, and each on its line.
  const back = await expectRun(0, ["diff", destination, second, first]);
  const lines = back.stdout.trimEnd().split("\n");
  expect(lines).toContain("removed        -  copy");
  expect(lines).toContain("changed     4.0K  a/b/file");
  expect(lines).toContain("renamed       0B  a/arrived -> moved");
  expect(lines).toContain("changed       1B  odd\\u000aname");
  expect(lines.length).toBe(15);
  expect(back.stderr).toContain(
    `From ${second} to ${first}: 2 added, 3 removed, 7 changed, 3 renamed;`,
  );
  // Only some, by the path at the source or in it; a rename counts on both sides.
  for (const [path = "", ...those] of [
    ["a", "changed a/b/file 4096", "removed a/linked 0", "renamed moved > a/arrived 0"],
    [join(source, "moved"), "renamed moved > a/arrived 0"],
    ["/logs/", "added logs/log 12288", "renamed logs/log > logs/log.1 0"],
    ["lo"],
    [".", ...expected],
  ])
    for (const place of [source, destination])
      expect(
        told(await expectRun(0, ["diff", "--json", place, first, second, path])).sort(),
      ).toEqual(those);
  await expectRun(2, ["diff", source, first, second, "../x"]);
  expect((await expectRun(0, ["diff", "-q", source, first, second, "lo"])).stderr).toBe("");
  // By directory.
  const summary = await expectRun(0, ["diff", "--summary", destination, first, second]);
  expect(summary.stdout.split("\n").map((line) => line.trim().replace(/ +/g, " "))).toEqual([
    "WRITTEN PATHS DIRECTORY",
    "16.1K 16 .",
    "12.0K 2 logs",
    "4.0K 3 a",
    "4.0K 1 a/b",
    "100B 1 renamed",
    "0B 2 empty",
    "0B 2 plain",
    "0B 1 empty/new",
    "",
  ]);
  const sums = await expectRun(0, ["diff", "--summary", "--json", destination, first, second]);
  expect(events(sums).find(({ path }) => path === "logs")).toEqual({
    event: "directory",
    path: "logs",
    bytes: 12288,
    shared: 0,
    paths: 2,
  });
});

test("what cannot be compared is refused, with the reason", async () => {
  const { source, snapshots, destination, a } = pair();
  const other = subvolume(join(a.path, "other"));
  snapshotAs(source, day(1));
  snapshotAs(source, day(3));
  sh(`btrfs -q subvolume snapshot -r "$1" "$2" >/dev/null`, other, join(snapshots, day(2)));
  await expectRun(0, ["-S", "-I", source, destination]);
  const refused = async (status: number, args: readonly string[], why: string) => {
    const result = await expectRun(status, ["diff", ...args]);
    expect(result.stderr).toContain(why);
    expect(result.stdout).toBe("");
  };
  const twice = [day(1), day(3)];
  await refused(1, [source, day(1), day(2)], "not related");
  await refused(1, [destination, ...twice], "not related"); // each was received in full
  await refused(1, [source, day(1), day(4)], `no complete snapshot ${day(4)}`);
  await refused(2, [source, day(1), day(1)], "given twice");
  await refused(2, [source, day(1)], "give two names");
  await refused(2, [source, day(1), "plain"], "plain is none");
  await refused(2, [destination], "is no SOURCE");
  // What may be misspelt is said again.
  await refused(0, [source, day(1), day(3), "nowhere"], "nothing differs at or below nowhere\n");
  await refused(2, [], "give LOCATION");
  await refused(2, ["shell://cat"], "nothing can be read");
  for (const store of [`raw://${a.path}/raw`, "rclone://s3:bucket/home"])
    await refused(2, [store, ...twice], "stored streams cannot be compared");
  await refused(1, [subvolume(join(a.path, "third")), ...twice], "nothing complete is there");
  await refused(2, [join(a.path, "third")], "has no snapshots");
  await refused(1, [join(a.path, "fourth")], "no such directory");
  expect(hidden(snapshots)).toEqual([]);
});

/** A btrfs whose `send` tells that it has begun, and waits for as long as a file is there. */
function waitingSend() {
  const directory = temporaryDirectory();
  const [gate, sending] = [join(directory, "gate"), join(directory, "sending")];
  writeFileSync(gate, "");
  writeFileSync(
    join(directory, "btrfs"),
    `#!/bin/sh\nif [ "$1" = send ]; then : >${sending}; while [ -e ${gate} ]; do sleep 0.02; done; fi\nexec ${sh("command -v btrfs")} "$@"\n`,
    { mode: 0o755 },
  );
  return { directory, gate, sending, env: { PATH: `${directory}:${process.env["PATH"]}` } };
}

test("whatever ends a diff, its snapshot goes: at once, or with the next diff or run; that of a living one stays", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, [source, destination]);
  writeFileSync(join(source, "new"), "new");
  const { gate, sending, env } = waitingSend();
  const begun = async (...options: string[]) => {
    rmSync(sending, { force: true });
    const running = start(["diff", ...options, source], { env });
    await waitFor("btrfs send", () => existsSync(sending));
    return running;
  };
  for (const [signal, status] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const) {
    const running = await begun();
    running.child.kill(signal);
    expect((await running.finished).status).toBe(status);
    await waitFor("the end of it", () => hidden(snapshots).length === 0);
  }
  const kill = async () => {
    const running = await begun();
    running.child.kill("SIGKILL");
    killAll(new RegExp(`btrfs.*${source}|/btrfs send `));
    await running.finished;
    expect(hidden(snapshots).length).toBe(1);
  };
  await kill();
  // A living one: neither another diff nor a run takes its snapshot away.
  const [left = ""] = hidden(snapshots);
  const living = await begun("--json");
  const [its = "", ...others] = hidden(snapshots);
  expect(others).toEqual([]);
  expect(its).not.toBe(left);
  const second = await begun();
  expect(hidden(snapshots)).toContain(its);
  rmSync(gate);
  const result = await living.finished;
  expect(result.status).toBe(0);
  expect(told(result)).toEqual(["added new 3"]);
  expect((await second.finished).status).toBe(0);
  expect(hidden(snapshots)).toEqual([]);
  writeFileSync(gate, "");
  // A dry run changes nothing; the next run clears.
  await kill();
  await expectRun(0, ["--dry-run", source, destination]);
  expect(hidden(snapshots).length).toBe(1);
  const holding = await begun();
  const all = hidden(snapshots);
  await nextSecond();
  await expectRun(0, [source, destination]);
  expect(hidden(snapshots).length).toBe(1);
  expect(all).toContain(hidden(snapshots)[0] as string);
  holding.child.kill("SIGTERM");
  await holding.finished;
  expect(hidden(snapshots)).toEqual([]);
  expect(snapshotNames(destination).length).toBe(2);
});

test("over ssh, a client that goes away leaves nothing there either", async () => {
  const { source, snapshots } = pair();
  await expectRun(0, [source]);
  const { options, url } = await sshServer();
  const { gate, sending, directory } = waitingSend();
  // Before the system's own, for whoever logs in.
  sh(`mount --bind "$1" /usr/local/sbin; chmod 755 "$1"`, directory);
  try {
    for (const signal of ["SIGINT", "SIGKILL"] as const) {
      const running = start(["diff", ...options, url(source)]);
      await waitFor("btrfs send", () => existsSync(sending));
      expect(hidden(snapshots).length).toBe(1);
      running.child.kill(signal);
      await running.finished;
      rmSync(gate);
      await waitFor("the end of it", () => hidden(snapshots).length === 0);
      writeFileSync(gate, "");
      rmSync(sending);
    }
  } finally {
    sh(`umount /usr/local/sbin`);
  }
});

test("a guarded key: two backups with --allow-read, now with --source, and nothing else", async () => {
  const { source, snapshots, destination, b } = pair();
  await expectRun(0, [source, destination]);
  writeFileSync(join(source, "new"), "new");
  await nextSecond();
  await expectRun(0, [source, destination]);
  const names = snapshotNames(destination);
  writeFileSync(join(source, "newer"), "newer");
  const { guarded, url } = await sshServer();
  const diff = (status: number, ...args: string[]) =>
    expectRun(status, ["diff", "--json", ...args]);
  const reading = guarded("--path", b.path, "--allow-read");
  expect(told(await diff(0, ...reading, url(destination), ...names))).toEqual(["added new 3"]);
  expect(
    (await diff(1, ...guarded("--path", b.path), url(destination), ...names)).stderr,
  ).toContain("--allow-read");
  const pulling = guarded("--path", source, "--source");
  expect(told(await diff(0, ...pulling, url(source)))).toEqual(["added newer 5"]);
  expect(told(await diff(0, ...pulling, url(source), ...names))).toEqual(["added new 3"]);
  const added = guarded("--path", source, "--allow-read");
  expect((await diff(1, ...added, url(source))).stderr).toContain("not for sources");
  expect(hidden(snapshots)).toEqual([]);
});

/** All paths below a directory but its snapshots, each with its type, mode and inode, and what it contains. */
const pathsIn = (top: string) =>
  new Map(
    sh(`cd "$1"; find . -mindepth 1 -path ./snapshot -prune -o -printf '%i %y %m %P\\n'`, top)
      .split("\n")
      .filter(Boolean)
      .map((line) => {
        const [, inode = "", state = "", path = ""] = /^(\d+) (\S+ \S+) (.*)$/.exec(line) ?? [];
        const contents = state.startsWith("f") ? readFileSync(join(top, path), "utf8") : "";
        return [path, { inode, state: `${state} ${contents}` }] as const;
      }),
  );

/** Moves a path along with the nearest of itself and the directories above it that was moved. */
function placed(path: string, moves: ReadonlyMap<string, string>): string {
  for (let above = path; above !== ""; above = above.slice(0, Math.max(0, above.lastIndexOf("/"))))
    if (moves.has(above)) return moves.get(above) + path.slice(above.length);
  return path;
}

/** What a diff told turns the names of one snapshot into those of the other, and leaves no change out. */
async function expectTold(source: string, names: readonly [string, string]): Promise<void> {
  const [before, after] = names.map((name) => pathsIn(join(source, "snapshot", name))) as [
    ReturnType<typeof pathsIn>,
    ReturnType<typeof pathsIn>,
  ];
  const result = await expectRun(0, ["diff", "--json", source, ...names]);
  const all = events(result).filter(({ event }) => event === "difference");
  const paths = (kind: string) =>
    all.flatMap(({ what, path }) => (what === kind ? [path as string] : []));
  const renamed = all.filter(({ what }) => what === "renamed");
  const moves = new Map(renamed.map(({ from, path }) => [from as string, path as string]));
  const back = new Map([...moves].map(([from, to]) => [to, from]));
  const isRemoved = new Set(paths("removed"));
  const stays = [...before.keys()].filter((path) => !isRemoved.has(path));
  const made = new Set([...stays.map((path) => placed(path, moves)), ...paths("added")]);
  const listed = new Set(all.map(({ path }) => path as string));
  // A file of several names is told by one of them.
  const inodes = new Set([...listed].map((path) => after.get(path)?.inode));
  const silent = [...after].filter(
    ([path, { inode, state }]) =>
      !inodes.has(inode) && before.get(placed(path, back))?.state !== state,
  );
  expect({ names, told: told(result), made: [...made].sort(), silent }).toEqual({
    names,
    told: told(result),
    made: [...after.keys()].sort(),
    silent: [],
  });
}

test("random changes: what is told turns the names of one into those of the other, and leaves no change out", async () => {
  const random = seeded();
  const pick = <T>(all: readonly T[]) => all[Math.floor(random() * all.length)];
  const { path } = filesystem();
  let made = 0;
  const step = (source: string) => {
    const all = [...pathsIn(source).keys()];
    const at = pick(["", ...all.map((one) => `${one}/`)]);
    const fresh = `${at}${pick(["a", "b", "c", `n${made++}`])}`;
    const [old = "none", other = "none"] = [pick(all), pick(all)];
    const [script = "", ...args] = pick<string[]>([
      [`[ -e "$2" ] || mkdir "$2"`, fresh],
      [`[ -d "$2" ] || echo "$3" >"$2"`, fresh, String(made)],
      [`[ -d "$2" ] || { echo "$3" >"$2.tmp"; mv -T "$2.tmp" "$2"; }`, fresh, String(made)],
      [`mv -T "$2" "$3"`, old, fresh],
      [`mv -T "$2" "$3"`, old, other],
      [`mv -T "$2" x; mv -T "$3" "$2"; mv -T x "$3"`, old, other],
      [`rm -r "$2"`, old],
      [`ln -T "$2" "$3"`, old, fresh],
      [`[ ! -f "$2" ] || echo "$3" >>"$2"`, old, String(made)],
      [`chmod 700 "$2"`, old],
      [`touch -d @"$3" "$2"`, old, String(made)],
    ]) as string[];
    sh(`cd "$1"; { ${script}; } 2>/dev/null || :`, source, ...args);
  };
  for (let round = 1; round <= soak(1); round++) {
    const source = subvolume(join(path, `home${round}`));
    for (let i = 0; i < 24; i++) step(source);
    for (let n = 1; n <= 4; n++) {
      for (let i = 0; i < 12; i++) step(source);
      snapshotAs(source, day(n));
    }
    for (const [from, to] of ["12", "23", "34", "14", "41", "31"])
      await expectTold(source, [day(Number(from)), day(Number(to))]);
  }
}, 600_000);
