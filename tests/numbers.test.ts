// Numbers before and while: how much a transfer takes, whether there is space for it, how far it is.

import { expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  PROGRAM,
  events,
  expectRun,
  filesystem,
  nextSecond,
  pair,
  sh,
  snapshotNames,
  subvolume,
  sshServer,
  subvolumes,
  temporaryDirectory,
  transfers,
} from "./support/rig.ts";

const MIB = 2 ** 20;
const random = (size: string, file: string) => sh(`head -c "$1" /dev/urandom >"$2"`, size, file);

test("a dry run tells the bytes of each transfer and of all, without taking a snapshot", async () => {
  const { source, snapshots, destination } = pair();
  const raw = `raw://${join(destination, "../raw")}`;
  random("20M", join(source, "first"));
  // What has been allocated and not written, and holes, are not sent.
  sh(`fallocate -l 50M "$1/allocated"; truncate -s 1G "$1/hole"`, source);
  const expectTold = async (most: number, kind: RegExp) => {
    const told = await expectRun(0, ["--dry-run", "--json", source, destination, raw]);
    const bytes = transfers(told).map((one) => one["bytes"] as number);
    expect(bytes.length).toBe(2);
    expect(events(told).at(-1)).toMatchObject({ event: "summary", bytes: 2 * (bytes[0] ?? 0) });
    expect(told.stderr).toMatch(kind);
    expect(existsSync(snapshots) ? snapshotNames(snapshots).length : 0).toBe(taken);
    await nextSecond();
    const real = transfers(await expectRun(0, ["--json", source, destination, raw]));
    taken++;
    for (const one of bytes) {
      expect(one).toBeGreaterThan(most);
      expect(Math.abs(one - (real[0]?.["bytes"] as number))).toBeLessThan(MIB / 2);
    }
  };
  let taken = 0;
  await expectTold(20 * MIB, /in full: .*, some 2\d\.\dM\)[^]*2 transfers of some 4\d\.\dM, 0 del/);
  random("3M", join(source, "second"));
  await expectTold(3 * MIB, /\(difference to \d+-\d+, some 3\.\dM\)[^]*of some 6\.\dM/);
  // So does one of a tree, where no folder is there yet, and one whose source a guarded key serves.
  const inner = subvolume(join(source, "inner"));
  random("7M", join(inner, "file"));
  const tree = join(destination, "../tree");
  const whole = await expectRun(0, ["--dry-run", "--json", "--recursive", source, tree]);
  const all = transfers(whole).map((one) => (one["bytes"] as number) / MIB);
  expect(all.map(Math.round).sort((one, other) => one - other)).toEqual([0, 3, 7, 20]);
  const { guarded, url } = await sshServer();
  const key = guarded("--path", source, "--source");
  const pulled = await expectRun(0, [...key, "--dry-run", "--json", url(source), `${tree}-pulled`]);
  expect(transfers(pulled)[0]?.["bytes"]).toBeGreaterThan(20 * MIB);
  // What stands already is estimated as its stream is.
  random("5M", join(source, "third"));
  await nextSecond();
  await expectRun(0, [source]);
  const later = await expectRun(0, ["-S", "--dry-run", "--json", source, destination]);
  expect(transfers(later)[0]?.["bytes"]).toBeGreaterThan(5 * MIB);
  expect(transfers(later)[0]?.["bytes"]).toBeLessThan(6 * MIB);
});

test("what a destination has no space for is refused before its first byte, without quotas", async () => {
  const { source, snapshots, destination } = pair();
  const disk = filesystem({ size: "150M" });
  const [small, raw] = [join(disk.path, "small"), join(disk.path, "raw")];
  mkdirSync(small);
  const { guarded, url } = await sshServer();
  const key = guarded("--path", disk.path);
  // A remote that can tell how much is free, but not whether data become less behind it, so that it is filled.
  const remote = join(filesystem({ size: "150M" }).path, "remote");
  const stores = [`raw://${raw}`, `rclone://:local:${remote}`];
  await expectRun(0, [...key, source, url(small), ...stores]);
  const [before, stored] = [snapshotNames(small), [raw, remote].map((one) => readdirSync(one))];
  // A difference, and over a guarded key.
  random("200M", join(source, "large"));
  await nextSecond();
  const far = url(small);
  const refused = await expectRun(1, [...key, source, far, ...stores, destination]);
  expect(
    refused.stderr.match(/takes 200\.\dM, and only \d+\.\dM are free there; --skip/g),
  ).toHaveLength(2);
  expect(refused.stderr).toMatch(
    /local:.*, and only \d+\.\dM are free there: it is tried all the same/,
  );
  expect(refused.stderr).toContain("--make-room");
  expect([...subvolumes(small).keys()]).toEqual(before);
  expect([raw, remote].map((one) => readdirSync(one))).toEqual(stored);
  const { stdout } = await expectRun(0, ["list", ...stores]);
  expect(stdout.match(/ of 150\.0M\n/g)).toHaveLength(2);
  expect(snapshotNames(destination)).toEqual(snapshotNames(snapshots));
  // A dry run says the same.
  const told = await expectRun(1, [...key, "-S", "--dry-run", source, far]);
  expect(told.stderr).toMatch(/takes 200\.\dM, and only/);
  // What is free now counts, not what was before a deletion came to its end.
  const ballast = subvolume(join(disk.path, "ballast"));
  random("40M", join(ballast, "x"));
  sh(`rm "$1/large"; sync`, source);
  random("50M", join(source, "other"));
  await nextSecond();
  await expectRun(1, ["--newest-only", source, small]);
  await nextSecond();
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, ballast);
  await expectRun(0, ["--newest-only", source, small]);
  // What a user calls a file, or says of it, is no number of ours.
  const saying = "data\nupdate_extent   ./x offset=0 len=88888888888\nmkfile ./y";
  writeFileSync(join(source, "x offset=0 len=99999999999"), "small");
  sh(`setfattr -n user.x -v "$2" "$1/x"*`, source, saying);
  await nextSecond();
  await expectRun(0, ["--newest-only", source, small]);
});

test("--make-room makes the room that an estimate says is lacking, and a dry run says so", async () => {
  const { source } = pair();
  const small = join(filesystem({ size: "200M" }).path, "small");
  random("70M", join(source, "file"));
  await expectRun(0, [source, small]);
  random("1M", join(source, "file"));
  await nextSecond();
  await expectRun(0, [source, small]);
  const [first] = snapshotNames(small);
  random("70M", join(source, "file"));
  await nextSecond();
  const args = ["-n", "1", source, small];
  expect((await expectRun(1, args)).stderr).toMatch(/takes 70\.\dM, and only/);
  const told = await expectRun(0, ["-S", "--dry-run", "--make-room", ...args]);
  expect(told.stderr).toContain(`Would delete 1 at ${small}: ${first} (to make room)`);
  await expectRun(0, ["-S", "--make-room", ...args]);
  expect(snapshotNames(small).length).toBe(1);
});

test("what may become less where it arrives is not refused: compression there, in a folder, or of what is sent", async () => {
  const { source } = pair();
  sh(`head -c 200M /dev/zero | tr "\\\\0" a >"$1/large"; sync`, source);
  const plain = filesystem({ size: "150M" });
  await expectRun(1, [source, join(plain.path, "x")]);
  // A received subvolume has this property from the one around it.
  const marked = join(subvolume(join(plain.path, "marked")), "deep");
  mkdirSync(marked);
  sh(`btrfs property set "$1/.." compression zstd`, marked);
  const mounted = filesystem({ size: "150M", mount: "noatime,compress=zstd" });
  const there = join(mounted.path, "x");
  await nextSecond();
  const sent = await expectRun(0, ["--newest-only", source, marked, there]);
  expect(sent.stderr.match(/it is tried all the same/g)).toHaveLength(2);
  for (const folder of [marked, there]) sh(`cmp "$1/large" "$2"/2*/large`, source, folder);
  // Compressed at the source, and sent so.
  const packed = pair();
  sh(
    `mount -o remount,compress=zstd "$2"; head -c 200M /dev/zero | tr "\\\\0" a >"$1/large"; sync; mount -o remount,compress=none "$2"`,
    packed.source,
    packed.a.path,
  );
  await expectRun(0, [packed.source, join(filesystem({ size: "150M" }).path, "x")]);
  // As a stream it is not: that of protocol 1 would be whole, and --compress makes it less.
  const stream = `raw://${join(filesystem({ size: "150M" }).path, "x")}`;
  expect((await expectRun(1, ["-S", source, stream])).stderr).toMatch(/takes 200\.\dM/);
  await expectRun(0, ["-S", "--newest-only", "--compress", "zstd", source, stream]);
});

/** What is on a wide screen in the end. */
function screenOf(text: string): string[] {
  const lines = [""];
  let [row, column] = [0, 0];
  for (const [piece, count, what] of text.matchAll(/\x1b\[(\d*)([A-Za-z])|[^]/g)) {
    const line = lines[row] ?? "";
    if (what === "A") row = Math.max(0, row - Number(count || 1));
    else if (what === "J") lines.splice(row, Infinity, line.slice(0, column));
    else if (piece === "\r") column = 0;
    else if (piece === "\n") lines[++row] ??= "";
    else if (what === undefined)
      lines[row] = line.slice(0, column).padEnd(column) + piece + line.slice(++column);
  }
  return lines;
}

/** Runs the program on a terminal of 80 columns; `typed`: as soon as that is seen, Ctrl-C. */
function onTerminal(environment: string, args: readonly string[], typed = ""): string {
  const log = join(temporaryDirectory(), "typescript");
  return sh(
    `log=$1; seen=$2; shift 2; : >"$log"
    { if [ -n "$seen" ]; then for i in $(seq 600); do ! grep -q "$seen" "$log" || break; sleep 0.02; done; printf "\\003"; fi; for i in $(seq 600); do ! grep -q "^Script done" "$log" || break; sleep 0.02; done; } |
      script -qefc "stty cols 80; $*" "$log" >/dev/null || :
    sed "1d;/^Script done/d" "$log"`,
    log,
    typed,
    `env -u NO_COLOR ${environment} ${PROGRAM.binary.join(" ")}`,
    ...args,
  );
}

test("on a terminal, percentage and time left come as soon as they are known, and Ctrl-C leaves no half line", async () => {
  const { source, snapshots, destination } = pair();
  random("12M", join(source, "first"));
  const args = ["--rate-limit", "5m", source, destination];
  const full = onTerminal("", args);
  expect(full).toMatch(/ [1-9]\d% 0:00:0\d left/);
  const drawn = full.match(/^.* left\r$/gm) ?? [];
  expect(drawn.filter((line) => line.replace(/\x1b\[\d*\w/g, "").length > 80)).toEqual([]);
  random("12M", join(source, "second"));
  await nextSecond();
  const shown = onTerminal("", args, "% 0:00:0. left");
  // Where it goes stands there as well.
  expect(shown).toMatch(new RegExp(`${destination.slice(-12)} .* \\d\\d?% 0:00:0\\d left`));
  const lines = screenOf(shown);
  expect(lines.filter((line) => /\/s 0:0|left$/.test(line))).toEqual([]);
  expect(lines.filter((line) => !/^(\[(info|error|warn)\] .*| {8}.*|\^C.*|)$/.test(line))).toEqual(
    [],
  );
  // What it was about to tell holds no snapshot: its parent, and itself, can be deleted.
  sh(`btrfs -q subvolume delete "$1"/2* >/dev/null`, snapshots);
});

test("without a terminal that can draw, a long transfer is told every ten minutes, unless --quiet", async () => {
  const { source, destination } = pair();
  random("15M", join(source, "first"));
  // A clock that goes 600 times as fast, but for who limits the rate.
  const clock = join(temporaryDirectory(), "clock.js");
  writeFileSync(
    clock,
    `if (!process.argv.includes("--relay")) { const [now, began] = [Date.now, Date.now()]; Date.now = () => began + 600 * (now() - began); }`,
  );
  const [bun = "", program = ""] = PROGRAM.bun;
  const how = [bun, "--preload", clock, program];
  const args = ["--rate-limit", "5m", source, destination];
  const { stderr } = await expectRun(0, args, { how });
  const news = stderr.match(/^\[info\] \d+-\d+ to .*: .* in 0:\d\d:\d\d, .*\/s.*$/gm) ?? [];
  expect(news.length).toBeGreaterThan(1);
  expect(news.length).toBeLessThan(5);
  expect(news.at(-1)).toMatch(/; \d+ % of some 15\.\dM, 0:\d\d:\d\d left$/);
  random("6M", join(source, "second"));
  await nextSecond();
  expect((await expectRun(0, ["-q", ...args], { how })).stderr).toBe("");
  // A terminal that cannot move its cursor gets no line to draw over, and no colour.
  random("6M", join(source, "third"));
  await nextSecond();
  const dumb = onTerminal("TERM=dumb", args);
  expect(dumb).toContain("[info] Done");
  expect(dumb).not.toContain("\x1b");
  expect(dumb).not.toMatch(/\/s 0:/);
});
