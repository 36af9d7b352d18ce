// Looking: what there is of each snapshot, whether it is whole to the last byte, and which
// versions of a file there are.

import { describe, expect, test } from "bun:test";
import {
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statfsSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import {
  change,
  damage,
  events,
  expectRun,
  expectSameTree,
  filesystem,
  history,
  manyStreams,
  mountImage,
  nextSecond,
  pair,
  pathWithout,
  ROOT,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  temporaryDirectory,
  unmount,
  type Result,
} from "./support/rig.ts";
import { generator } from "./support/random.ts";
import { day } from "./support/names.ts";

const listed = (result: Result) =>
  events(result).find(({ event }) => event === "list") as Record<string, any>;
/** The rows of a printed table, by name: its age and marks. */
const rows = ({ stdout }: Result) =>
  new Map(
    stdout
      .split("\n\n")[0]
      ?.split("\n")
      .filter((line) => /^\S*\d{8}-\d{6} /.test(line))
      .map((line) => [line.split("  ")[0] as string, line.split(/ {2,}/).slice(2)]),
  );

describe("list", () => {
  test("each kind of mark, in 80 columns", async () => {
    const { source, destination, b } = pair();
    const second = join(filesystem().path, "second");
    for (const n of [1, 2, 3]) snapshotAs(source, day(n));
    await expectRun(0, ["-S", source, destination]);
    await expectRun(0, ["-S", "--newest-only", source, second]);
    for (const n of [4, 5]) snapshotAs(source, day(n));
    await expectRun(0, ["-S", "--newest-only", source, second]);
    sh(
      `btrfs -q subvolume create "$1/${day(4)}" >/dev/null; btrfs -q subvolume create "$2/x" >/dev/null; btrfs -q subvolume snapshot -r "$2/x" "$2/y"; btrfs send -q "$2/y" | btrfs receive -q "$1"; mv "$1/y" "$1/${day(5)}"; mkdir "$1/photos"`,
      destination,
      b.path,
    );
    const result = await expectRun(0, ["list", "-N", "2", "-n", "2", source]);
    expect([...rows(result).keys()]).toEqual([1, 2, 3, 4, 5].map(day)); // the newest last
    expect(rows(result)).toEqual(
      new Map([
        [day(5), ["whole", "other", "whole, pin"]],
        [day(4), ["whole", "incomplete", "-"]],
        [day(3), ["whole", "whole, pin", "whole"]],
        [day(2), ["whole, goes", "whole, goes", "-"]],
        [day(1), ["whole, goes", "whole, goes", "-"]],
      ]),
    );
    // Below them, in all: how many are whole, from when to when, the longest gap, and what is free there.
    const [table = "", totals = "", legend = ""] = result.stdout.split("\n\n");
    expect(totals.split("\n").map((line) => line.replace(/ {2,}/g, "  "))).toEqual([
      expect.stringMatching(/^ +ALL  FROM  TO  LONGEST GAP  FREE$/),
      expect.stringMatching(
        new RegExp(`^A  5  ${day(1)}  ${day(5)}  24 hours  [\\d.]+[MG] of [\\d.]+[MG]$`),
      ),
      expect.stringMatching(new RegExp(`^B  3  ${day(1)}  ${day(3)}  24 hours  [\\d.]+[MG] of`)),
      expect.stringMatching(new RegExp(`^C  2  ${day(3)}  ${day(5)}  2 days  [\\d.]+[MG] of`)),
    ]);
    expect(legend.split("\n")).toEqual([
      `A  ${source} (source)`,
      expect.stringMatching(new RegExp(`^B  ${destination}, last served \\d+ seconds? ago$`)),
      expect.stringMatching(new RegExp(`^C  ${second}, last served \\d+ seconds? ago$`)),
    ]);
    const lines = [table, totals].flatMap((block) => block.split("\n"));
    expect(Math.max(...lines.map((line) => line.length))).toBeLessThanOrEqual(80);
    // Of many, the newest; the totals count all, and to programs the newest is the first.
    const newest = await expectRun(0, ["list", "--last", "2", source]);
    expect(newest.stdout).toStartWith("… 3 older\n");
    expect([...rows(newest).keys()]).toEqual([day(4), day(5)]);
    expect(newest.stdout).toMatch(new RegExp(`^A +5 +${day(1)} `, "m"));
    const told = listed(await expectRun(0, ["list", "--json", "--last", "1", source]));
    expect(told["snapshots"].map(({ name }: { name: string }) => name)).toEqual([day(5)]);
    const { bavail, bsize, blocks } = statfsSync(b.path);
    expect(told["locations"][1]).toMatchObject({
      count: 3,
      oldest: day(1),
      newest: day(3),
      longest_gap: 86400e3,
      size: blocks * bsize,
    });
    expect(Math.abs(told["locations"][1].free - bavail * bsize)).toBeLessThan(16 << 20);
    await expectRun(2, ["list", "--last", "0", source]);
    // The same as data, with given destinations, over ssh, and by any order of locations.
    const { options, url } = await sshServer();
    const json = listed(
      await expectRun(0, [
        "list",
        "--json",
        "-N",
        "2",
        "-n",
        "2",
        ...options,
        url(source),
        url(destination),
        second,
      ]),
    );
    expect(
      json["snapshots"].map(({ name, at }: Record<string, any>) => [
        name,
        ...at.map((mark: any) => mark && mark.state),
      ]),
    ).toEqual([
      [day(5), "whole", "other", "whole"],
      [day(4), "whole", "incomplete", null],
      [day(3), "whole", "whole", "whole"],
      [day(2), "whole", "whole", null],
      [day(1), "whole", "whole", null],
    ]);
    expect(json["snapshots"][2].at[1]).toMatchObject({
      pin: true,
      goes: false,
      uuid: expect.stringMatching(/^[0-9a-f-]{36}$/),
    });
    expect([...rows(await expectRun(0, ["list", destination, second])).values()]).toEqual([
      ["whole", "-"],
      ["whole", "-"],
      ["whole", "whole"],
      ["incomplete", "-"],
      ["whole", "other"],
    ]);
  });

  test("what it says will go is what goes", async () => {
    const { source, snapshots, destination } = pair();
    const second = join(filesystem().path, "second");
    for (const n of [1, 2, 3, 4, 5, 6]) snapshotAs(source, day(n));
    await expectRun(0, ["-S", source, destination]);
    sh(`btrfs -q subvolume delete "$1/${day(6)}" >/dev/null`, destination); // so that the pins differ
    await expectRun(0, ["-S", "--newest-only", source, second]);
    for (const [policies, places] of [
      [["-N", "3", "-n", "2"], [source]],
      [["-N", "1"], [source]],
      [
        ["-n", "1"],
        [source, destination],
      ],
    ] as const) {
      const at: { name: string; at: ({ goes: boolean } | null)[] }[] = listed(
        await expectRun(0, ["list", "--json", ...policies, ...places]),
      )["snapshots"];
      const staying = (i: number) =>
        at
          .filter(({ at: marks }) => marks[i]?.goes === false)
          .map(({ name }) => name)
          .toSorted();
      const expected = [staying(0), staying(1)];
      await expectRun(0, ["-S", "-T", ...policies, source, "--locked-dests"]);
      expect([snapshotNames(snapshots), snapshotNames(destination)]).toEqual(
        expected as [string[], string[]],
      );
    }
  });

  test("a place that cannot be reached is marked, exit 1; so is the wrong disk", async () => {
    const { source, destination, b } = pair();
    await expectRun(0, [source, destination]);
    await expectRun(0, ["-S", source, "shell://cat >/dev/null"]);
    unmount(b);
    const away = await expectRun(1, ["list", source, "--json"]);
    expect(listed(away)["locations"]).toMatchObject([
      { source: true, error: null },
      { id: destination, error: expect.stringContaining("no such directory") },
      { id: "shell://cat >/dev/null", error: null },
    ]);
    mkdirSync(destination);
    const result = await expectRun(1, ["list", source]);
    expect([...rows(result).values()]).toEqual([["whole", "?, pin", "?, pin"]]);
    expect(result.stdout).toContain("cannot be read");
    expect(result.stderr).toContain("is the disk mounted?");
    rmSync(destination, { recursive: true });
    const other = filesystem();
    sh(`mkdir "$1/backup"; mount --bind "$1" "$2"`, other.path, b.path);
    expect((await expectRun(1, ["list", source])).stderr).toContain(
      "another filesystem than before",
    );
    sh(`umount "$1"`, b.path);
    mountImage(b);
    await expectRun(0, ["list", source]);
    expect((await expectRun(1, ["list", source, "ssh://127.0.0.1:1/x"])).stderr).toContain(
      "refused",
    );
    await expectRun(1, ["list", "/nowhere/at/all"]);
    await expectRun(2, ["list", source, "shell://cat"]);
  });

  test("several prefixes are a table each; sizes are told when they are asked for", async () => {
    const { source, snapshots, destination } = pair();
    sh(`head -c 3M /dev/urandom >"$1/large"`, source);
    for (const prefix of ["a-", "b-"]) await expectRun(0, ["-p", prefix, source, destination]);
    const tables = events(await expectRun(0, ["list", "--json", "--size", source])).filter(
      ({ event }) => event === "list",
    );
    expect(tables.map(({ prefix, snapshots: all }) => [prefix, all.length])).toEqual([
      ["a-", 1],
      ["b-", 1],
    ]);
    const [name = ""] = snapshotNames(snapshots, "a-");
    const bytes = Number(
      sh(`btrfs filesystem du -s --raw "$1" | awk 'NR == 2 { print $1 }'`, join(snapshots, name)),
    );
    expect(tables[0]?.["snapshots"][0].at[0]).toMatchObject({ state: "whole", bytes });
    expect(bytes).toBeGreaterThan(3 << 20);
    expect((await expectRun(0, ["list", "-p", "b-", "--size", source])).stdout).toMatch(
      /b-\d{8}-\d{6} .*whole 3\.\d+M +whole, pin 3\.\d+M/,
    );
    expect((await expectRun(0, ["list", source])).stdout).not.toMatch(/whole [\d.]+M/);
    // Each table says when its own prefix was last served.
    await expectRun(0, ["-p", "b-", "-S", source, destination]);
    const lasts = events(await expectRun(0, ["list", "--json", source]))
      .filter(({ event }) => event === "list")
      .map(({ locations }) => locations[1].last);
    expect(new Set(lasts).size).toBe(2);
  });

  test("--max-age is a check: one line, and exit 1 when the newest complete backup is too old, or not there", async () => {
    const { source, destination } = pair();
    await expectRun(0, [source, destination]);
    const fine = await expectRun(0, ["list", "--max-age", "26h", destination]);
    expect(fine.stdout).toMatch(
      new RegExp(
        `^OK: ${destination}: the newest backup is \\d{8}-\\d{6}, \\d+ seconds? old \\(at most 26h\\)\n$`,
      ),
    );
    expect(fine.stderr).toBe("");
    const old = join(filesystem().path, "old");
    snapshotAs(source, "20200101-000000");
    sh(`btrfs -q subvolume delete "$1"/202[^0]* >/dev/null`, join(source, "snapshot"));
    await expectRun(0, ["-S", source, old]);
    sh(`btrfs -q subvolume create "$1/$2" >/dev/null`, old, sh("date +%Y%m%d-%H%M%S")); // an incomplete one does not count
    expect((await expectRun(1, ["list", "--max-age", "26h", old])).stdout).toMatch(
      /^TOO OLD: .* 20200101-000000, \d+ years old/,
    );
    expect((await expectRun(1, ["list", "--max-age", "26h", temporaryDirectory()])).stdout).toMatch(
      /^UNKNOWN: .*not on btrfs/,
    );
    expect(await expectRun(1, ["list", "--max-age", "26h", "/nowhere/x"])).toMatchObject({
      stderr: "",
      stdout: expect.stringMatching(/^UNKNOWN: .*\n$/),
    });
    const empty = filesystem();
    expect((await expectRun(1, ["list", "--max-age", "26h", empty.path])).stdout).toContain(
      "no complete backup",
    );
    expect(
      (await expectRun(1, ["list", "--max-age", "26h", destination, old])).stdout.split("\n")
        .length,
    ).toBe(3);
    expect(
      events(await expectRun(1, ["list", "--json", "--max-age", "26h", "/nowhere/x"])),
    ).toMatchObject([
      { event: "age", ok: false, error: expect.stringContaining("no such directory") },
    ]);
    // One that is dated in the future would be young for ever; of several prefixes, each must be young.
    sh(`mv "$1/20200101-000000" "$1/20991231-000000"`, old);
    expect((await expectRun(1, ["list", "--max-age", "26h", old])).stdout).toContain(
      "no complete backup",
    );
    const prefixed = join(empty.path, "prefixed");
    await expectRun(0, ["-p", "a-", source, prefixed]);
    expect((await expectRun(0, ["list", "--max-age", "26h", prefixed])).stdout).toContain(
      "the newest backup is a-",
    );
    await expectRun(0, ["-p", "b-", source, prefixed]);
    sh(`for b in "$1"/b-*; do mv "$b" "$1/b-20200101-000000"; done`, prefixed);
    expect((await expectRun(1, ["list", "--max-age", "26h", prefixed])).stdout).toContain(
      "b-20200101-000000",
    );
    expect((await expectRun(1, ["list", "--max-age", "26h", prefixed])).stdout).toMatch(
      /^OK: .* a-\d.*\nTOO OLD: .* b-2020.*\n$/,
    );
    await expectRun(0, ["list", "-p", "a-", "--max-age", "26h", prefixed]);
    await expectRun(2, ["list", "--max-age", "soon", destination]);
  });
});

test("what --if-changed found, and what may be away, is no alarm; and each place has its line, whatever another one is", async () => {
  const { source, destination, b } = pair();
  const directory = temporaryDirectory();
  const store = `raw://${directory}/store`;
  const places = [source, "--optional", destination, store];
  const name = "20200101-000000";
  snapshotAs(source, name);
  // The first place is served last.
  const slow = ["--for", destination, "--rate-limit", "300k"];
  const first = await expectRun(0, ["-S", ...places, ...slow]);
  // A summary has the order of the command line, and so has what the source remembers.
  const summed = first.stderr.slice(first.stderr.indexOf("Done:"));
  expect(summed.match(/^(\/|raw:)\S*/gm)).toEqual([source, destination, store]);
  const aged = (status: number, ...more: string[]) =>
    expectRun(status, ["list", "--max-age", "26h", ...more]);
  const verdicts = ({ stdout }: Result) =>
    stdout
      .split("\n")
      .flatMap((line) => /^([A-Z ]+): (.*?): /.exec(line)?.slice(1, 3).join(" ") ?? []);
  const all = [source, destination, store];
  expect(verdicts(await aged(1, ...all))).toEqual(all.map((id) => `TOO OLD ${id}`));

  // Nothing is newer at the source: a snapshot of 2020 is as young as the run that found that.
  await expectRun(0, ["--if-changed", ...places]);
  expect(snapshotNames(destination)).toEqual([name]);
  const told = await aged(0, ...all);
  expect(verdicts(told)).toEqual(all.map((id) => `OK ${id}`));
  expect(told.stdout).toMatch(
    new RegExp(
      `${name}, \\d+ years old, and nothing had changed \\d+ seconds? ago \\(at most 26h\\)`,
    ),
  );
  // The destination's own record says so; a store has none. What was found in the future is nothing.
  await aged(0, destination);
  expect(events(await aged(1, "--json", store))).toMatchObject([
    { ok: false, newest: name, unchanged: null, prefix: "" },
  ]);
  const record = join(destination, ".btrfs-backup.json");
  const before = readFileSync(record, "utf8");
  writeFileSync(record, before.replace(/"at":"\d{4}/, '"at":"2099'));
  await aged(1, destination);
  writeFileSync(record, before);

  // A plain file, nothing, a directory that is no backup: a line each, and none hides another.
  writeFileSync(join(directory, "file"), "");
  const odd = [join(directory, "file"), "/nowhere", destination, directory, "raw:///nowhere"];
  expect(verdicts(await aged(1, ...odd))).toEqual(
    odd.map((id) => `${id === destination ? "OK" : "UNKNOWN"} ${id}`),
  );

  // Argument files, one of which makes no sense, while the disk that may be away is.
  unmount(b);
  const put = (file: string, ...words: string[]) =>
    writeFileSync(join(directory, `${file}.args`), `${words.join("\n")}\n`);
  put("home", source, `--optional ${destination}`, store, "shell://cat >/dev/null");
  put("wrong", "--nonsense");
  const where = ["--config-dir", directory];
  const away = await aged(2, ...where);
  expect(verdicts(away)).toEqual([
    `OK ${source}`,
    `OK ${destination}`,
    `OK ${store}`,
    "UNKNOWN shell://cat >/dev/null",
    `UNKNOWN wrong.args`,
  ]);
  expect(away.stdout).toMatch(/: not there; last served \d+ seconds? ago \(at most 26h\)\n/);
  rmSync(join(directory, "wrong.args"));
  for (const args of [[source], where]) {
    const listing = await expectRun(0, ["list", ...args]);
    expect([listing.stderr, [...rows(listing).values()][0]?.slice(0, 2)]).toEqual([
      "",
      ["whole", "?, pin"],
    ]);
    expect(listing.stdout).toMatch(/\nB  .*, last served .*, optional, not there now\n/);
  }
  const json = await expectRun(0, ["list", "--json", source]);
  expect(listed(json)["locations"][1]).toMatchObject({
    id: destination,
    optional: true,
    error: expect.stringContaining("no such directory"),
    free: null,
  });
  // Away for too long; and one that must be there.
  const own = join(source, "snapshot/.btrfs-backup.json");
  writeFileSync(own, readFileSync(own, "utf8").replaceAll(/"last":"\d{4}/g, '"last":"2020'));
  expect((await aged(1, ...where)).stdout).toMatch(
    /^TOO OLD: .*: not there; last served \d+ years/m,
  );
  await run(["-S", source, destination]);
  expect((await expectRun(1, ["list", source])).stderr).toContain("is the disk mounted?");
});

test("--size asks quotas, which tell at once what would be free", async () => {
  const { source, destination, b } = pair();
  sh(`head -c 3M /dev/urandom >"$1/large"; btrfs quota enable "$2"`, source, b.path);
  await expectRun(0, [source, destination]);
  sh(`rm "$1/large"; head -c 2M /dev/urandom >"$1/other"`, source);
  await nextSecond();
  await expectRun(0, [source, destination]);
  sh(`btrfs quota rescan -w "$1" >/dev/null 2>&1 || :; btrfs filesystem sync "$1"`, b.path);
  const counted = snapshotNames(destination)
    .toReversed()
    .map((name) => {
      const at = join(destination, name);
      const line = sh(`btrfs qgroup show --raw -f "$1" | grep '^0/' | head -n 1`, at).split(/\s+/);
      return { bytes: Number(line[1]), frees: Number(line[2]) };
    });
  expect(counted[1]?.frees).toBeGreaterThan(3 << 20); // only the older one has the large file
  const { options, url, guarded } = await sshServer();
  const reading = guarded("--path", destination, "--allow-read");
  for (const [args, place] of [
    [[], destination],
    [options, url(destination)],
    [reading, url(destination)],
  ] as const) {
    const { snapshots } = listed(await expectRun(0, ["list", "--json", "--size", ...args, place]));
    expect(snapshots.map(({ at }: any) => at[0])).toMatchObject(counted);
  }
  const table = await expectRun(0, ["list", "--size", source, destination]);
  expect(table.stdout).toMatch(/ whole, pin 2\.\dM \(2\.\dM\)\n/);
  expect(table.stdout).toContain("\n(…): what would be free if only that one were deleted\n");
  // Simple quotas count otherwise, and are not asked.
  sh(`btrfs quota disable "$1"`, b.path);
  const without = listed(await expectRun(0, ["list", "--json", "--size", destination]));
  expect(without["snapshots"][0].at[0]).toMatchObject({ bytes: expect.any(Number), frees: null });
});

test("verify of many tells how far it is and ends with one line; -v info tells each", async () => {
  const { source, destination } = pair();
  const store = `raw://${temporaryDirectory()}`;
  for (const n of [1, 2, 3]) {
    sh(`head -c 1M /dev/urandom >"$1/large"`, source);
    snapshotAs(source, day(n));
  }
  await expectRun(0, ["-S", source, destination, store]);
  const short = /^\[info\] 3 of 3 are well, [\d.]+M in \d+ seconds?\n$/;
  expect((await expectRun(0, ["verify", store])).stderr).toMatch(short);
  expect((await expectRun(0, ["verify", "--all", source, destination])).stderr).toMatch(short);
  expect((await expectRun(0, ["verify", "-q", store])).stderr).toBe("");
  const each = await expectRun(0, ["verify", "-v", "info", store]);
  expect(each.stderr.match(/is as it was stored/g)?.length).toBe(3);
  const one = await expectRun(0, ["verify", source, destination]);
  expect(one.stderr).toMatch(/ is equal \(SHA-256 [^]*1 of 1 is well, 4?\d*[\d.]+M in /);
  const program = join(ROOT, "dist/btrfs-backup");
  const drawn = sh(`script -qec "$1 verify $2" /dev/null`, program, store);
  expect(drawn).toMatch(/0 of 3 i[^]*\x1b\[1A[^]*3 of 3 are well/);
  expect(sh(`script -qec "$1 verify -P $2" /dev/null`, program, store)).not.toContain("\x1b[1A");
  damage(join(destination, day(2)), "echo bad >plain/0");
  const bad = await expectRun(1, ["verify", "--all", "--json", source, destination, store]);
  expect(bad.stderr).toContain("5 of 6 are well");
  expect(events(bad).at(-1)).toMatchObject({ event: "summary", ok: false, well: 5, of: 6 });
});

test("-v debug shows what is run as a person would type it, and -d the scripts", async () => {
  const { source, destination } = pair();
  const { stderr } = await expectRun(0, ["-v", "debug", source, destination]);
  const [name = ""] = snapshotNames(destination);
  expect(stderr).toMatch(new RegExp(`^\\[debug\\] open .*folder=${source}/snapshot `, "m"));
  expect(stderr).toMatch(
    new RegExp(
      `^\\[debug\\] pipeline: send .*snapshot=${name} .* \\| .*receive .*folder=${destination} `,
      "m",
    ),
  );
  expect(stderr).not.toMatch(/printf|sh -c|esac/);
  expect(Math.max(...stderr.split("\n").map((line) => line.length))).toBeLessThan(1000);
  await nextSecond();
  expect((await expectRun(0, ["-v", "debug", "-d", source, destination])).stderr).toContain("esac");
});

describe("verify", () => {
  test("the newest that both have, one, or all; here, over ssh, and of two backups; without writing anything", async () => {
    const { source, snapshots, destination, a, b } = pair();
    sh(
      `python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])' "$1/plain/socket"; ln -s /nowhere "$1/plain/-T"; echo x >"$1/--to-command=id"; mkdir "$1/plain/nothing"`,
      source,
    );
    const { options, url } = await sshServer();
    const random = generator(8);
    for (let i = 0; i < 3; i++) {
      await expectRun(0, [source, destination]);
      change(source, random);
      await nextSecond();
    }
    const second = join(filesystem().path, "second");
    const [first = "", , third = ""] = snapshotNames(snapshots);
    await expectRun(0, ["copy", destination, second]);
    for (const { path } of [a, b]) sh(`mount -o remount,ro "$1"`, path);
    const verified = (result: Result) =>
      events(result)
        .filter(({ event }) => event === "verify")
        .map(({ name, equal }) => [name, equal]);
    expect(verified(await expectRun(0, ["verify", "--json", source, destination]))).toEqual([
      [third, true],
    ]);
    expect(
      verified(
        await expectRun(0, [
          "verify",
          "--json",
          "--snapshot",
          first,
          ...options,
          source,
          url(destination),
          second,
        ]),
      ),
    ).toEqual([
      [first, true],
      [first, true],
    ]);
    expect(
      verified(
        await expectRun(0, ["verify", "--json", "--all", ...options, url(source), destination]),
      ),
    ).toEqual(snapshotNames(snapshots).map((name) => [name, true]));
    expect(verified(await expectRun(0, ["verify", "--json", destination, second]))).toEqual([
      [third, true],
    ]);
    expect((await expectRun(0, ["verify", "-q", destination, second])).stderr).toBe("");
  }, 60_000);

  const differences: Record<string, [script: string, message: RegExp]> = {
    "one flipped byte": [
      `t=$(stat -c %y plain/20); printf X | dd of=plain/20 bs=1 seek=3 conv=notrunc 2>/dev/null; touch -d "$t" plain/20`,
      /plain\/20: contents$/m,
    ],
    "an mtime nanosecond": [
      `touch -d '2001-02-03 04:05:06.123456788' plain/4`,
      /plain\/4: mtime \d+\.123456789 and \d+\.123456788$/m,
    ],
    "a lost xattr": [`setfattr -x user.note plain/6`, /plain\/6: attributes$/m],
    "another ACL": [`setfacl -m u:1234:r plain/7`, /plain\/7: mode 664 and 644, attributes$/m],
    "an attribute of the top directory": [`setfattr -n user.top -v x .`, /: \.: attributes$/m],
    "a broken hard link": [
      `t=$(stat -c %y plain); cp -a plain/5 x; t2=$(stat -c %y .); mv x plain/5; touch -d "$t" plain`,
      /(hard link to \S*plain\/5 and none|hard link to none)/,
    ],
    "an extra empty directory": [
      `t=$(stat -c %y empty); mkdir empty/more; touch -d "$t" empty`,
      /empty\/more is only in/,
    ],
    "another owner and mode": [
      `chown 1235 plain/3; chmod 600 plain/9`,
      /plain\/3: owner 1234:4321 and 1235:4321; \.\/plain\/9: mode 644 and 600$/m,
    ],
    "another link target": [
      `t=$(stat -c %y plain); ln -snf elsewhere plain/symlink; touch -h -d "$(stat -c %y plain/4)" plain/symlink; touch -d "$t" plain`,
      /plain\/symlink: .*target/,
    ],
    "a device": [
      `t=$(stat -c %y plain); m=$(stat -c %y plain/null); rm plain/null; mknod plain/null c 1 5; touch -d "$m" plain/null; touch -d "$t" plain`,
      /plain\/null: device 1:3 and 1:5/,
    ],
    "a missing file": [
      `t=$(stat -c %y plain); rm plain/11; touch -d "$t" plain`,
      /plain\/11 is only in/,
    ],
    "twelve files": [
      `for i in 9 10 11 12 13 14 15 16 17 18 19 20; do touch -d @0 plain/$i; done`,
      /(.*; ){10}and 2 more$/m,
    ],
  };
  describe("catches", () => {
    const { source, destination, b } = pair();
    for (const [i, [what, [script, message]]] of Object.entries(differences).entries())
      test(what, async () => {
        const backups = `${destination}${i}`;
        if (i === 0) await expectRun(0, [source]);
        await expectRun(0, ["-S", source, backups]);
        const [name = ""] = snapshotNames(backups);
        damage(join(backups, name), ":");
        await expectRun(0, ["verify", source, backups]); // the damage alone is not seen
        damage(join(backups, name), script);
        const result = await expectRun(1, ["verify", "--json", source, backups]);
        expect(events(result).find(({ event }) => event === "verify")).toMatchObject({
          name,
          equal: false,
        });
        expect(result.stderr).toMatch(message);
      });
    test("and without getfattr it says that it is an attribute", async () => {
      const { stderr } = await expectRun(1, ["verify", source, `${destination}2`], {
        env: { PATH: pathWithout("getfattr") },
      });
      expect(stderr).toMatch(/attributes/);
      expect(b.path).not.toBe("");
    });
  });

  test("what TAR_OPTIONS, other users' names, and names that are not text could hide or make up", async () => {
    const { source, destination } = pair();
    const { options, url, user } = await sshServer();
    sh(
      `setfacl -m u:1234:r "$1/plain/1"; for b in "\\376" "\\377"; do printf x >"$1/$(printf "not$b")"; done; python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])' "$1/socket"`,
      source,
    );
    await expectRun(0, [source, destination]);
    const [name = ""] = snapshotNames(destination);
    // Over there 1234 has a name.
    const [passwd, shell] = [
      join(temporaryDirectory(), "passwd"),
      join(temporaryDirectory(), "shell"),
    ];
    user("named", shell);
    writeFileSync(passwd, `${readFileSync("/etc/passwd", "utf8")}bob:x:1234:1234::/:/bin/sh\n`);
    writeFileSync(
      shell,
      `#!/bin/bash\nexec unshare --mount bash -c 'mount --bind ${passwd} /etc/passwd; exec dash "$@"' x "$@"\n`,
      { mode: 0o755 },
    );
    await expectRun(0, ["verify", ...options, source, url(destination, "named")]);
    damage(
      join(destination, name),
      `t=$(stat -c %y plain/1); printf 99999999 | dd of=plain/1 bs=8 conv=notrunc 2>/dev/null; touch -d "$t" plain/1`,
    );
    await expectRun(1, ["verify", source, destination], { env: { TAR_OPTIONS: "--exclude=1" } });
    damage(join(destination, name), `printf '\\x39' >"$(printf 'not\\376')"; chmod 700 socket`);
    const { stderr } = await expectRun(1, ["verify", source, destination]);
    expect(stderr).toMatch(/not\ufffd: .*contents/);
    expect(stderr).toMatch(/socket: mode 755 and 700/);
  });

  test("nothing in common, a name that is not shared, one place of several: exit 1", async () => {
    const { source, destination, a } = pair();
    await expectRun(0, [source, destination]);
    const other = subvolume(join(a.path, "other"));
    await expectRun(0, [other]);
    expect((await expectRun(1, ["verify", other, destination])).stderr).toContain(
      "nothing complete is shared",
    );
    expect((await expectRun(1, ["verify", other, destination])).stderr).toContain(
      "nothing was compared",
    );
    const high = dirname(destination);
    expect((await expectRun(1, ["verify", source, high])).stderr).toContain(
      `nothing was compared; ${high} has no snapshots; ${destination} has some`,
    );
    expect(
      (await expectRun(1, ["verify", "--snapshot", "20200101-000000", source, destination])).stderr,
    ).toContain("20200101-000000 is not complete on both sides");
    const partly = await expectRun(1, ["verify", "--json", source, "/nowhere/there", destination]);
    expect(events(partly).filter(({ event }) => event === "verify")).toMatchObject([
      { equal: true },
    ]);
    // A place that is compared with itself proves nothing, by whatever name.
    const { options, url } = await sshServer();
    expect(
      (await expectRun(1, ["verify", ...options, source, url(join(source, "snapshot"))])).stderr,
    ).toContain("the same folder");
    for (const words of [
      [source],
      ["--all", "--snapshot", "x", source, destination],
      [source, join(destination, snapshotNames(destination)[0] ?? "")],
    ])
      await expectRun(2, ["verify", ...words]);
  });

  test("a tool that is missing or fails is an error, never equal", async () => {
    const { source, destination } = pair();
    await expectRun(0, [source, destination]);
    for (const tool of ["tar", "sha256sum"])
      expect(
        (await expectRun(1, ["verify", source, destination], { env: { PATH: pathWithout(tool) } }))
          .stderr,
      ).toContain(`${tool} not found`);
    const busybox = pathWithout("tar");
    sh(`ln -s "$(command -v busybox)" "$1/tar"`, busybox);
    expect(
      (await expectRun(1, ["verify", source, destination], { env: { PATH: busybox } })).stderr,
    ).toContain("GNU tar not found");
    for (const tool of ["tar", "find", "sort"]) {
      const failing = pathWithout(tool);
      writeFileSync(
        join(failing, tool),
        `#!/bin/sh\n/usr/bin/${tool} "$@"\ncase "$*" in *--version*) ;; *) echo "${tool}: Input/output error" >&2; exit 2;; esac\n`,
        { mode: 0o755 },
      );
      const { stdout } = await expectRun(1, ["verify", "--json", source, destination], {
        env: { PATH: failing },
      });
      expect([tool, stdout.includes('"equal":true')]).toEqual([tool, false]);
    }
  });
});

describe("versions", () => {
  const { source, snapshots, destination, a } = pair();
  const file = join(source, "docs/letter");
  const shown = async (args: string[], cwd?: string) =>
    events(
      await expectRun(0, ["versions", "--json", ...args], cwd === undefined ? {} : { cwd }),
    ).filter(({ event }) => event === "version");

  test("consecutive equal ones are one row, over the source and its known destinations", async () => {
    mkdirSync(join(source, "docs/more"), { recursive: true });
    const steps = [
      () => writeFileSync(file, "one"),
      () => {},
      () => writeFileSync(file, "second"),
      () => rmSync(file),
      () => writeFileSync(file, "third!"),
      () => {},
    ];
    for (const [i, step] of steps.entries()) {
      step();
      snapshotAs(source, day(i + 1));
    }
    await expectRun(0, ["-S", "-N", "4", source, destination]);
    expect(
      (await shown([file])).map(({ first, last, state, locations }) => [
        first,
        last,
        state?.size ?? null,
        locations.length,
      ]),
    ).toEqual([
      [day(5), day(6), "6", 2],
      [day(4), day(4), null, 2],
      [day(3), day(3), "6", 2],
      [day(1), day(2), "3", 1],
    ]);
    const { stdout } = await expectRun(0, ["versions", file]);
    expect(stdout).toMatch(
      new RegExp(
        `${day(5)}  ${day(6)}  6B +20\\d\\d-\\d\\d-\\d\\d \\d\\d:\\d\\d:\\d\\d  A B \\(as it is now\\)`,
      ),
    );
    expect(stdout).toMatch(new RegExp(`${day(4)}  ${day(4)}  deleted +- +A B`));
    // A relative path, one location, nothing known of it, and over ssh.
    expect((await shown(["letter", destination], join(source, "docs"))).length).toBe(4);
    const { options, url } = await sshServer();
    expect((await shown([...options, url(file), destination])).length).toBe(4);
    expect((await expectRun(1, ["versions", join(source, "never")])).stderr).toContain(
      "is in none of 6 snapshots",
    );
    // What nobody can tell is not said to be so.
    const unasked = await expectRun(1, ["versions", join(temporaryDirectory(), "x")]);
    expect(unasked.stderr).toContain("btrfs");
    expect(unasked.stderr).not.toContain("there are no snapshots");
  });

  test("--get copies one back, by name or time, never over a file that is there", async () => {
    const mode = { env: {} };
    await expectRun(0, ["versions", file, "--get", day(3)], mode);
    expect(readFileSync(`${file}.${day(3)}`, "utf8")).toBe("second");
    expect((await expectRun(1, ["versions", file, "--get", day(3)])).stderr).toContain(
      "exists: --force replaces it",
    );
    const to = join(source, "elsewhere");
    await expectRun(0, ["versions", file, "--get", "2026-01-04 12:00", "--to", to]); // it was deleted then: the last before
    expect(readFileSync(to, "utf8")).toBe("second");
    expect(
      (await expectRun(1, ["versions", file, "--get", "2026-01-01", "--to", file])).stderr,
    ).toContain("--force");
    expect(readFileSync(file, "utf8")).toBe("third!");
    await expectRun(0, ["versions", file, "--get", "2026-01-01", "--to", file, "--force"]);
    expect(readFileSync(file, "utf8")).toBe("one");
    expect(
      (await expectRun(1, ["versions", file, "--get", day(4), "--to", to, "--force"])).stderr,
    ).toContain("not in a snapshot");
    expect((await expectRun(1, ["versions", file, "--get", "2025-01-01"])).stderr).toContain(
      "in no snapshot from that time",
    );
    await expectRun(2, ["versions", file, "--to", to]);
    await expectRun(2, ["versions", file, "--get", "2026-13-01"]);
    expect((await expectRun(2, ["versions", file, "--get", "yesterday"])).stderr).toContain(
      "the name of a snapshot, or a time like",
    );
  });

  test("a deleted directory comes back with all that it held; over ssh as well", async () => {
    const { options, url } = await sshServer();
    rmSync(join(source, "plain"), { recursive: true });
    const then = join(source, "then");
    for (const [i, [args, from]] of (
      [
        [[join(source, "plain")], day(6)],
        [[...options, join(source, "plain"), url(destination)], day(5)],
      ] as const
    ).entries()) {
      const folder = join(then, String(i));
      mkdirSync(folder, { recursive: true });
      if (i === 1) sh(`btrfs -q subvolume delete "$1"/* >/dev/null`, snapshots);
      await expectRun(0, ["versions", ...args, "--get", from, "--to", join(folder, "plain")]);
      // Beside it, the same alone: a digest of both tells any difference.
      const expected = join(then, `expected-${i}`);
      mkdirSync(expected);
      sh(`cp -a "$1/plain" "$2"`, join(destination, from), expected);
      expectSameTree(expected, folder);
    }
    expect(
      (await shown([join(source, "plain/deep/er/large")])).map(({ locations }) => locations),
    ).toEqual([[destination]]);
    expect(
      (await expectRun(1, ["versions", join(source, "plain/deep/er/large"), "--get", day(5)]))
        .stderr,
    ).toContain("plain/deep/er");
  });

  test("a copy within a filesystem shares its data", async () => {
    sh(`head -c 5M /dev/urandom >"$1/large"`, source);
    await nextSecond();
    await expectRun(0, [source]);
    const [name = ""] = snapshotNames(snapshots);
    await expectRun(0, ["versions", join(source, "large"), "--get", name]);
    expect(
      sh(
        `btrfs filesystem du -s --raw "$1" | awk 'NR == 2 { print $2 }'`,
        join(source, `large.${name}`),
      ),
    ).toBe("0");
    expect(statSync(join(source, `large.${name}`)).mtimeMs).toBe(
      statSync(join(source, "large")).mtimeMs,
    );
  });

  test("a symbolic link is itself, and one in a snapshot leads nowhere outside", async () => {
    const [sub, elsewhere] = [subvolume(join(a.path, "sub")), temporaryDirectory()];
    writeFileSync(join(elsewhere, "secret"), "outside");
    sh(`mkdir "$1/dir"; ln -s "$2" "$1/link"; echo inside >"$1/dir/secret"`, sub, elsewhere);
    sh(`mv "$1/dir" "$1/aside"; ln -s "$2" "$1/dir"`, sub, elsewhere);
    await expectRun(0, [sub]);
    sh(`rm "$1/dir"; mv "$1/aside" "$1/dir"`, sub);
    const [name = ""] = snapshotNames(join(sub, "snapshot"));
    expect((await shown([join(sub, "link")]))[0]).toMatchObject({
      state: { type: "symbolic link", target: expect.stringContaining(elsewhere) },
    });
    await expectRun(0, ["versions", join(sub, "link"), "--get", name]);
    expect(lstatSync(join(sub, `link.${name}`)).isSymbolicLink()).toBe(true);
    expect((await expectRun(1, ["versions", join(sub, "dir/secret")])).stderr).toContain(
      "is in none of 1 snapshot of",
    );
    expect(
      (await expectRun(1, ["versions", join(sub, "dir/secret"), "--get", name])).stderr,
    ).toContain(`not in a snapshot ${name}`);
    expect(existsSync(join(sub, `dir/secret.${name}`))).toBe(false);
  });

  test("what cannot be done is told: no directory, one in the way, a relative path elsewhere, no GNU stat", async () => {
    const { options, url } = await sshServer();
    const [name = ""] = snapshotNames(snapshots);
    const large = join(source, "large");
    expect(
      (await expectRun(1, ["versions", large, "--get", name, "--to", join(source, "no/such")]))
        .stderr,
    ).toContain("no such directory");
    expect(
      (await expectRun(1, ["versions", large, "--get", name, "--to", then(), "--force"])).stderr,
    ).toContain("is a directory");
    expect(readdirSync(then()).length).toBeGreaterThan(0);
    await expectRun(2, ["versions", ...options, url(large), "--get", name, "--to", "here"]);
    const busybox = pathWithout("stat");
    sh(`ln -s "$(command -v busybox)" "$1/stat"`, busybox);
    expect((await expectRun(1, ["versions", large], { env: { PATH: busybox } })).stderr).toContain(
      "install coreutils",
    );
  });
  const then = () => join(source, "then");

  test("a sparse file stays sparse over ssh, and a place that is away is no failure where another has the version", async () => {
    const { options, url } = await sshServer();
    const [one, c] = [subvolume(join(a.path, "one")), filesystem()];
    sh(`truncate -s 300M "$1/sparse"; setfacl -m u:1234:r "$1/sparse"`, one);
    await expectRun(0, [...options, one, join(c.path, "backup")]);
    const [name = ""] = snapshotNames(join(one, "snapshot"));
    await expectRun(0, [
      "versions",
      ...options,
      url(join(one, "sparse")),
      url(join(c.path, "backup")),
      "--get",
      name,
      "--to",
      join(one, "first"),
    ]);
    unmount(c);
    const away = await expectRun(0, [
      "versions",
      join(one, "sparse"),
      "--get",
      name,
      "--to",
      join(one, "second"),
    ]);
    expect(away.stderr).toContain("no such directory");
    expect((await expectRun(1, ["versions", join(one, "sparse")])).stdout).toContain(
      "cannot be read",
    );
    mountImage(c);
    sh(`btrfs -q subvolume delete "$1"/snapshot/2* >/dev/null`, one);
    await expectRun(0, [
      "versions",
      join(one, "sparse"),
      ...options,
      url(join(c.path, "backup")),
      "--get",
      name,
      "--to",
      join(one, "third"),
    ]);
    for (const copy of ["first", "second", "third"]) {
      expect(Number(sh(`du -k "$1" | cut -f 1`, join(one, copy)))).toBeLessThan(1024);
      expect([
        copy,
        statSync(join(one, copy)).size,
        sh(`getfacl -n "$1" 2>/dev/null | grep -c user:1234:r--`, join(one, copy)),
      ]).toEqual([copy, 300 << 20, "1"]);
    }
    // The whole source is lost: its backups know where it was.
    sh(`btrfs -q subvolume delete "$1" >/dev/null`, one);
    expect(
      (await shown([join(one, "sparse"), join(c.path, "backup")])).map(({ first }) => first),
    ).toEqual([name]);
  });

  test("names that could be options or syntax", async () => {
    const sub = subvolume(join(a.path, "odd"));
    const names = [
      "-rf",
      "--help",
      "a b",
      `q'"$(x)\\`,
      "new\nline",
      "ü",
      "end\n",
      "end",
      "*",
      "a/b -> c",
    ];
    mkdirSync(join(sub, "a"));
    for (const name of names) writeFileSync(join(sub, name), name);
    await expectRun(0, [sub]);
    const [snapshot = ""] = snapshotNames(join(sub, "snapshot"));
    for (const [i, name] of names.entries()) {
      await expectRun(0, [
        "versions",
        join(sub, name),
        "--get",
        snapshot,
        "--to",
        join(sub, `back-${i}`),
      ]);
      expect(readFileSync(join(sub, `back-${i}`), "utf8")).toBe(name);
    }
  });
});

/** The numbers of processes and threads that commands take on few things, and on many. */
async function taken(commands: readonly (readonly string[])[]) {
  const pids = () => Number(sh("echo $BASHPID"));
  const all = [];
  for (const args of commands) {
    const before = pids();
    const result = await run(args);
    all.push({ spent: pids() - before, result });
  }
  return all;
}
/** Threads of the runtime come and go; a process for each of many would be hundreds. */
function expectAlike(
  few: Awaited<ReturnType<typeof taken>>,
  many: Awaited<ReturnType<typeof taken>>,
) {
  console.log(
    "processes and threads:",
    few.map(({ spent }, i) => `${spent} and ${many[i]?.spent}`).join(", "),
  );
  for (const [i, { spent }] of few.entries())
    expect(Math.abs((many[i]?.spent ?? 0) - spent)).toBeLessThan(50);
}

test("where no fence can be had, versions looks for links itself, at every depth, or says that it cannot", async () => {
  const { source, snapshots } = pair();
  sh(`cd "$1"; echo x >file; mkdir -p a/b; echo y >a/b/file; ln -s /etc link`, source);
  await expectRun(0, [source]);
  sh(`cd "$1"; rm link; mkdir link`, source);
  const tools = temporaryDirectory();
  writeFileSync(join(tools, "mount"), "#!/bin/sh\nexit 1\n", { mode: 0o755 });
  const env = { PATH: `${tools}:${process.env["PATH"]}` };
  const [name = ""] = snapshotNames(snapshots);
  for (const path of ["file", "a/b/file", "a/b"])
    expect((await expectRun(0, ["versions", join(source, path)], { env })).stdout).toContain(name);
  expect(
    (await expectRun(1, ["versions", join(source, "link/hostname")], { env })).stderr,
  ).toContain("is in none of 1 snapshot");
  for (const script of ["exit 127", 'for path; do [ "$path" = -e ] || echo "/$path"; done']) {
    writeFileSync(join(tools, "realpath"), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
    expect((await expectRun(1, ["versions", join(source, "file")], { env })).stderr).toContain(
      "GNU realpath not found",
    );
  }
});

test("list, versions and prune of 1,000 snapshots at two places take as many processes as of 10", async () => {
  const { source, snapshots, destination } = pair();
  sh(`mkdir -p "$1/a/b/c"; echo x >"$1/a/b/c/file"`, source);
  await expectRun(0, [source, destination]);
  history(source, snapshots, 9, [destination]);
  const commands = [
    ["list", "--json", source],
    ["versions", "--json", join(source, "a/b/c/file")],
    ["prune", "--dry-run", "-n", "1000", destination],
    ["prune", "--dry-run", "-n", "5", destination],
  ];
  const few = await taken(commands);
  sh(
    `cd "$1"; btrfs -q subvolume delete 2010* >/dev/null; cd "$2"; btrfs -q subvolume delete 2010* >/dev/null`,
    snapshots,
    destination,
  );
  history(source, snapshots, 999, [destination]);
  const many = await taken(commands);
  expect(many.map(({ result }) => result.status)).toEqual([0, 0, 0, 0]);
  const [list, versions] = many.map(({ result }) => result) as [any, any];
  expect(listed(list)["snapshots"].length).toBe(1000);
  expect(
    listed(list)["snapshots"].every(
      ({ at }: any) => at[0]?.state === "whole" && at[1]?.state === "whole",
    ),
  ).toBe(true);
  expect(events(versions).find(({ event }) => event === "version")?.["snapshots"].length).toBe(
    1000,
  );
  expectAlike(few, many);
}, 120_000);

test("verify and prune of 300 small streams, and prune of 30 prefixes, take as many processes as of a few", async () => {
  const { source, b } = pair();
  const folder = join(b.path, "stored");
  await expectRun(0, [source, `raw://${folder}`]);
  manyStreams(folder, 5);
  const few = await taken([
    ["verify", `raw://${folder}`],
    ["prune", "-n", "5", `raw://${folder}`],
  ]);
  manyStreams(folder, 300);
  const many = await taken([
    ["verify", `raw://${folder}`],
    ["prune", "-n", "5", `raw://${folder}`],
  ]);
  expectAlike(few, many);
  // Each is read: under another name, it is another stream than that says.
  expect(
    many[0]?.result.stderr.match(/has the right SHA-256, but cannot be received: a stream of/g)
      ?.length,
  ).toBe(300);
  expect(many[1]?.result.status).toBe(0);
  expect(readdirSync(folder).filter((name) => name.endsWith(".btrfs")).length).toBe(5);
  // Prefixes: nothing goes, and all are looked at together.
  const backups = join(b.path, "backups");
  const prefixed = async (from: number, to: number) => {
    for (let i = from; i <= to; i++)
      await expectRun(0, ["-q", "-f", `snapshots${i}`, "-p", `host${i}-`, source, backups]);
  };
  await prefixed(1, 2);
  const two = await taken([["prune", "-n", "5", backups]]);
  await prefixed(3, 30);
  expectAlike(two, await taken([["prune", "-n", "5", backups]]));
}, 120_000);
