// Transfers that break and go on where they broke. The link is a real one, between two network namespaces.

import { expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { commandFor, VERBS, type Verb } from "../btrfs-backup.ts";
import {
  events,
  expectRun,
  expectSound,
  filesystem,
  linkedServer,
  nextSecond,
  pair,
  sh,
  snapshotNames,
  sshServer,
  start,
  subvolumes,
  temporaryDirectory,
  waitFor,
  type LinkedServer,
  logged,
} from "./support/rig.ts";
import { seeded, soak } from "./support/random.ts";

const FAST = ["--ssh-opt", "ServerAliveInterval=1", "--ssh-opt", "ConnectTimeout=2"];
const parts = (folder: string) =>
  existsSync(folder) ? readdirSync(folder).filter((name) => name.endsWith(".part")) : [];
const kept = (folder: string) =>
  parts(folder).reduce((sum, name) => sum + statSync(join(folder, name)).size, 0);
const streamSize = (snapshot: string, protocol: number) =>
  Number(
    sh(
      `btrfs send -q --proto "$2" $([ "$2" = 1 ] || echo --compressed-data) "$1" | wc -c`,
      snapshot,
      String(protocol),
    ),
  );
/** Runs until so much of the stream is over there, and cuts the link then: it fails. */
async function broken(server: LinkedServer, args: string[], folder: string, bytes: number) {
  const running = start([...args, "--rate-limit", "20m"]);
  await waitFor("some of the stream", () => kept(folder) > bytes);
  server.cut();
  const result = await running.finished;
  expect([result.status, result.stderr]).toEqual([
    1,
    expect.stringMatching(/connection is lost|cannot/),
  ]);
  server.mend();
  // What had arrived over there can still be written, as long as the silence lasts.
  await waitFor(
    "the other side",
    () => sh(`flock -n "$1/.btrfs-backup..receiving" echo free || :`, folder) === "free",
  );
}
const resumed = (result: { stderr: string }) =>
  /([\d.]+[KMG]) of \S+ are there already/.exec(result.stderr)?.[1];

test("a transfer that is cut at random points is finished by the same run, and each byte crosses the link once", async () => {
  const size = 2 ** 20 * Math.min(1024, 128 * soak(3)); // 1 GiB with SOAK=10
  const random = seeded();
  for (const stored of [false, true]) {
    const { source, snapshots, destination, b } = pair({ size: "4G" });
    const server = await linkedServer();
    sh(`head -c "$2" /dev/urandom >"$1/large"`, source, String(size));
    const place = stored ? `raw+${server.url(join(b.path, "stored"))}` : server.url(destination);
    const folder = stored ? join(b.path, "stored") : destination;
    const cuts = Array.from(
      { length: stored ? Math.ceil(soak(3) / 3) : soak(3) },
      () => random() * size,
    ).sort((x, y) => x - y);
    const before = server.crossed();
    const running = start([
      ...server.options,
      ...FAST,
      "--json",
      "--resume",
      "--retries",
      "30",
      "--rate-limit",
      "100m",
      source,
      place,
    ]);
    for (const [i, cut] of cuts.entries()) {
      const tries = () => running.stderr().split(/more tries|one more try/).length - 1;
      const had = tries();
      await waitFor(
        `cut ${i}`,
        () => kept(folder) >= cut * 0.98 || running.child.exitCode !== null,
        120,
      );
      if (running.child.exitCode !== null) break;
      server.cut();
      await waitFor("the run to notice", () => tries() > had);
      server.mend();
    }
    const result = await running.finished;
    expect([result.status, result.stderr]).toEqual([0, expect.any(String)]);
    const [name = ""] = snapshotNames(snapshots);
    const stream = streamSize(join(snapshots, name), stored ? 1 : 2);
    const crossed = server.crossed() - before;
    console.log(
      `${cuts.length} cuts, ${crossed} bytes crossed for a stream of ${stream}: ${(crossed / stream).toFixed(4)}`,
    );
    expect(crossed).toBeLessThan(stream * 1.05);
    expect(
      events(result)
        .filter(({ event }) => event === "transfer")
        .map(({ bytes }) => bytes),
    ).toEqual([stream]);
    expect(parts(folder)).toEqual([]);
    if (stored) await expectRun(0, ["verify", `raw://${folder}`]);
    else expectSound(destination, snapshots);
    expect(snapshotNames(snapshots).length).toBe(1);
    // And from there on as ever.
    await nextSecond();
    const next = await expectRun(0, [...server.options, "--json", source, place]);
    expect(events(next).find(({ event }) => event === "transfer")).toMatchObject({ parent: name });
  }
}, 900_000);

test("the next run goes on: pushed, pulled, compressed, incremental, and over a guarded key", async () => {
  const { source, snapshots, destination, b } = pair({ size: "2G" });
  const server = await linkedServer();
  sh(`head -c 60M /dev/urandom >"$1/large"`, source);
  const stored = join(b.path, "stored");
  const raw = `raw+${server.url(stored)}`;
  const key = server.guarded("--path", b.path);
  const pulling = server.guarded("--path", source, "--source");
  const cases: [how: string[], from: string, to: string, folder: string, again?: string[]][] = [
    [
      [...key, "--compress", "zstd:3"],
      source,
      server.url(destination),
      destination,
      ["--compress", "zstd:7"],
    ],
    [
      [...key, "--full-every", "1", "--compress", "zstd:3", "--protocol", "2"],
      source,
      raw,
      stored,
      ["--protocol", "1"],
    ],
    [pulling, server.url(source), destination, destination],
    [[...server.options, "--compress", "zstd"], server.url(source), `raw://${stored}`, stored],
  ];
  for (const [i, [how, from, to, folder, again = []]] of cases.entries()) {
    sh(`head -c 40M /dev/urandom >"$1/large-$2"`, source, String(i));
    const args = [...how, ...FAST, "--resume", from, to];
    await nextSecond();
    await broken(server, args, folder, 15 << 20);
    const before = server.crossed();
    const had = kept(folder);
    const result = await expectRun(0, [...args, ...again, "--json", "-S", "--wait", "30"]);
    expect([i, resumed(result)]).toEqual([i, expect.any(String)]);
    const sent = events(result)
      .filter(({ event }) => event === "transfer")
      .reduce((sum, { bytes }) => sum + bytes, 0);
    expect(server.crossed() - before).toBeLessThan(sent - had * 0.9 + 2e6 + sent * 0.02);
    expect(parts(folder)).toEqual([]);
    if (to.startsWith("raw")) await expectRun(0, ["verify", `raw://${stored}`]);
    else expectSound(destination, snapshots);
  }
  expect([...subvolumes(destination).values()].every(({ readonly }) => readonly)).toBe(true);
}, 600_000);

test("what does not fit any more begins anew by itself, and what is not gone on from does not stay", async () => {
  const { source, snapshots, destination } = pair({ size: "2G" });
  const server = await linkedServer();
  sh(`head -c 60M /dev/urandom >"$1/large"`, source);
  const args = [...server.options, ...FAST, "--resume", source, server.url(destination)];
  // Another stream: the kept bytes are not the ones that would be sent.
  await broken(server, args, destination, 15 << 20);
  sh(
    `printf x | dd of="$1" bs=1 seek=1000000 conv=notrunc 2>/dev/null`,
    join(destination, parts(destination)[0] as string),
  );
  const anew = await expectRun(0, [...args, "-S", "--wait", "30"]);
  expect(anew.stderr).toContain("begins anew");
  expectSound(destination, snapshots);
  // Another snapshot, another base, or no --resume.
  for (const next of [
    ["--wait", "30"],
    ["-S", "--wait", "30", "-I"],
    ["-S", "--wait", "30"],
  ]) {
    sh(`head -c 40M /dev/urandom >"$1/more"`, source);
    await nextSecond();
    await broken(server, args, destination, 15 << 20);
    expect(parts(destination).length).toBe(1);
    await expectRun(0, [
      ...(next.includes("--wait") && next.length === 3 && next[0] === "-S"
        ? args.filter((arg) => arg !== "--resume")
        : args),
      ...next,
    ]);
    expect(parts(destination)).toEqual([]);
    expectSound(destination, snapshots);
    expect(snapshotNames(destination)).toEqual(snapshotNames(snapshots));
  }
  // A foreign file that is called alike is nobody's.
  sh(`touch "$1/.mine.part" "$1/.20260101-000000.p0-.part"`, destination);
  await expectRun(0, [...server.options, "-S", source, server.url(destination)]);
  expect(parts(destination).sort()).toEqual([".20260101-000000.p0-.part", ".mine.part"]);
}, 600_000);

test("where others can write, nothing is gone on from: they could have put a link there", async () => {
  const { source, destination, b } = pair();
  const server = await linkedServer();
  sh(`head -c 60M /dev/urandom >"$1/large"`, source);
  const args = [...server.options, ...FAST, "--resume", source, server.url(destination)];
  await broken(server, args, destination, 15 << 20);
  sh(
    `chmod 777 "$1"; f=$(ls -a "$1" | grep 'part$'); mv "$1/$f" "$2/elsewhere"; ln -s "$2/elsewhere" "$1/$f"`,
    destination,
    dirname(destination),
  );
  const before = sh(`sha256sum <"$1"`, join(b.path, "elsewhere"));
  expect(resumed(await expectRun(0, [...args, "-S", "--wait", "30"]))).toBeUndefined();
  expect(sh(`sha256sum <"$1"`, join(b.path, "elsewhere"))).toBe(before);
  expectSound(destination, join(source, "snapshot"));
});

test("what it needs is checked before, and stated; with --encrypt-to it is a usage error", async () => {
  const { source, snapshots } = pair();
  const { options, url } = await sshServer();
  const small = filesystem({ size: "300M" });
  sh(`head -c 120M /dev/urandom >"$1/large"`, source);
  const place = join(small.path, "x");
  const refused = await expectRun(1, [...options, "--resume", source, url(place)]);
  expect(refused.stderr).toMatch(
    /takes 2\d\d\.\dM there with --resume, and only \d+\.\dM are free; --skip-space-check/,
  );
  expect([snapshotNames(place), parts(place)]).toEqual([[], []]);
  const stated = await expectRun(0, [
    ...options,
    "-S",
    "--resume",
    source,
    `raw+${url(join(small.path, "y"))}`,
  ]);
  expect(stated.stderr).toMatch(
    /the stream of some 12\d\.\dM is kept there until it is whole, which takes 12\d\.\dM of/,
  );
  expect(
    (
      await expectRun(2, [
        "--resume",
        "--encrypt-to",
        "me@example.org",
        source,
        `raw+${url(place)}`,
      ])
    ).stderr,
  ).toContain("--resume and --encrypt-to exclude each other");
  // Here there is no link that could break.
  const local = join(filesystem().path, "x");
  await expectRun(0, ["-S", "--resume", source, local]);
  expectSound(local, snapshots);
});

test("--retries tries again only what a connection is needed for, and says what is wrong with all else once", async () => {
  const { source, destination } = pair();
  const { options } = await sshServer();
  const file = join(temporaryDirectory(), "file");
  sh(`touch "$1"`, file);
  const result = await expectRun(1, [
    ...options,
    "--retries",
    "1",
    source,
    destination,
    "ssh://127.0.0.1:1/backup",
    file,
  ]);
  expect(logged(result.stderr).match(/one more try/g)?.length).toBe(1);
  expect(logged(result.stderr).match(/is not a directory|not a directory/g)?.length).toBe(1);
  expect(snapshotNames(destination).length).toBe(1);
  expect((await expectRun(2, ["--retries", "x", source, destination])).stderr).toContain(
    "--retries takes a whole number",
  );
});

test("a part that is not what was sent is neither stored nor received", () => {
  const folder = join(filesystem().path, "x");
  sh(`mkdir "$1"`, folder);
  const fsid = sh(`stat -f -c %i "$1"`, folder);
  const object =
    "20260101-000000+0000_12345678_12345678_00000001-aaaa-bbbb-cccc-0123456789ab_00000002-aaaa-bbbb-cccc-0123456789ab_full.btrfs";
  const part = `${object}.p0-3`;
  const sumOf = (from: number) =>
    sh(
      `tail -c +$(($2 + 1)) "$1" | sha256sum | cut -c -64`,
      join(folder, `.${part}.part`),
      String(from),
    );
  const runs = (verb: string, ...args: string[]) =>
    spawnSync(
      "sh",
      [
        "-c",
        commandFor(
          { label: "", ssh: null, sudo: false, beat: 15 },
          VERBS.find(({ name }) => name === verb) as Verb,
          args,
        ),
      ],
      { encoding: "utf8" },
    );
  sh(`head -c 200000 /dev/urandom >"$1/.$2.part"`, folder, part);
  const right = [sumOf(65536), "200000", part, "65536"];
  for (const [at, wrong] of [
    [0, sumOf(0)],
    [1, "200001"],
    [3, "131072"],
  ] as const) {
    const args = right.with(at, wrong);
    expect([
      at,
      runs(
        "commit",
        folder,
        fsid,
        "",
        object,
        args[0] as string,
        args[1] as string,
        args[2] as string,
        args[3] as string,
      ).status,
    ]).toEqual([at, 1]);
    expect([
      at,
      runs(
        "receive",
        "-q",
        folder,
        fsid,
        "",
        "",
        "",
        "",
        "",
        "",
        "",
        part,
        args[0] as string,
        args[1] as string,
        args[3] as string,
      ).status,
    ]).toEqual([at, 1]);
  }
  expect(readdirSync(folder).filter((name) => !name.startsWith("."))).toEqual([]);
  const whole = sumOf(0);
  const stored = runs("commit", folder, fsid, "", object, ...right);
  expect([stored.status, stored.stderr]).toEqual([0, ""]);
  expect(
    sh(`head -c 64 "$1/$2.sha256"; echo; sha256sum <"$1/$2" | cut -c -64`, folder, object),
  ).toBe(`${whole}\n${whole}`);
});
