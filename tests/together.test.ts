// One stream for several destinations, and several streams at a time.

import { describe, expect, test } from "bun:test";
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  contentsDigest,
  events,
  expectRun,
  expectSound,
  filesystem,
  fill,
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
  logged,
} from "./support/rig.ts";
import { killAll } from "./support/processes.ts";

/** A PATH on which every call of btrfs is written down, and `calls` to count those that begin so, but for looks at the head of a stream. */
function counted(): { env: Record<string, string>; calls: (words: string) => number } {
  const tools = temporaryDirectory();
  writeFileSync(
    join(tools, "btrfs"),
    `#!/bin/sh\necho "$*" >>${tools}/log\nexec ${sh("command -v btrfs")} "$@"\n`,
    { mode: 0o755 },
  );
  return {
    env: { PATH: `${tools}:${process.env["PATH"]}` },
    calls: (words) =>
      readFileSync(join(tools, "log"), "utf8")
        .split("\n")
        .filter((line) => line.startsWith(words) && !line.includes("--no-data")).length,
  };
}
/** What a run says of each destination's transfers. */
const transfersTo = (all: Record<string, any>[], destination: string) =>
  all.filter((one) => one["event"] === "transfer" && one["destination"] === destination);

test("destinations that need the same stream get it from one btrfs send, here and over ssh, and keep being served so", async () => {
  const { source, snapshots, destination, b } = pair();
  const { options, url } = await sshServer();
  const [other, far] = [join(filesystem().path, "other"), join(filesystem().path, "far")];
  const places = [destination, other, url(far)];
  const out = temporaryDirectory();
  const stored = [`raw://${join(b.path, "stored")}`, `shell://cat >${out}/$BTRFS_BACKUP_NAME`];
  for (let i = 0; i < 3; i++) {
    writeFileSync(join(source, "file"), String(i));
    const { env, calls } = counted();
    const all = events(
      await expectRun(
        0,
        [
          ...options,
          "--json",
          "-n",
          "2",
          source,
          ...places,
          stored[0] as string,
          "--for",
          stored[1] as string,
          "-n",
          "0",
        ],
        { env },
      ),
    );
    // The stored ones are protocol 1.
    expect([calls("send"), calls("receive")]).toEqual([2, 2]); // the third one over there
    for (const place of [...places, ...stored])
      expect(transfersTo(all, place)).toMatchObject([
        { parent: i === 0 ? null : snapshotNames(snapshots).at(-2) },
      ]);
    const bytes = places.map((place) => transfersTo(all, place)[0]?.["bytes"] as number);
    expect(Math.max(...bytes)).toBe(Math.min(...bytes));
    await nextSecond();
  }
  for (const folder of [destination, other, far]) {
    expectSound(folder, snapshots);
    expect(snapshotNames(folder).length).toBe(2);
  }
  for (const place of places) await expectRun(0, ["verify", ...options, source, place]);
  await expectRun(0, ["verify", stored[0] as string]);
  for (const name of snapshotNames(snapshots))
    expect(sh(`btrfs receive --dump <"$1/$2" | grep -c ^ || :`, out, name)).not.toBe("0");
});

describe("of several destinations", () => {
  test("one that fails drops out: the others get all, and it gets its own next time", async () => {
    const { source, snapshots, destination } = pair();
    sh(`head -c 40M /dev/urandom >"$1/large"`, source);
    const small = filesystem({ size: "110M", mkfs: ["--mixed"] });
    sh(`head -c 90M /dev/urandom >"$1/ballast"`, small.path);
    const [full, third] = [join(small.path, "full"), join(filesystem().path, "third")];
    const { env, calls } = counted();
    const failed = await expectRun(
      1,
      ["--json", "--skip-space-check", source, destination, full, third],
      { env },
    );
    expect(calls("send")).toBe(1);
    expect(failed.stderr).toContain(`${full}: btrfs receive failed with exit status 1`);
    expect(failed.stderr).toContain("No space left on device");
    for (const place of [destination, third]) {
      expect(transfersTo(events(failed), place).length).toBe(1);
      expectSound(place, snapshots);
    }
    expect([...subvolumes(full).keys()]).toEqual([]);
    rmSync(join(small.path, "ballast"));
    sh(`sync -f "$1"`, small.path);
    await nextSecond();
    await expectRun(0, [source, destination, full, third]);
    for (const place of [destination, full, third]) expectSound(place, snapshots);
  });

  test("when the stream itself breaks, none of those who share it sees an end", async () => {
    const { source } = pair();
    sh(`head -c 50M /dev/urandom >"$1/large"`, source);
    const directory = temporaryDirectory();
    const sink = (name: string) =>
      `shell://{ head -c 1000000 >/dev/null; touch ${directory}/${name}.began; exec pv -q -L 2m; } | { cat >/dev/null; touch ${directory}/${name}.ended; }`;
    const { env, calls } = counted();
    const running = start([source, sink("a"), sink("b"), sink("c")], { env });
    await waitFor("the stream to begin", () =>
      ["a", "b", "c"].every((name) => existsSync(join(directory, `${name}.began`))),
    );
    expect(calls("send")).toBe(1);
    killAll(/btrfs send -q /);
    const { status, stderr } = await running.finished;
    expect(status).toBe(1);
    expect(logged(stderr).match(/btrfs send was killed by signal 9/g)?.length).toBe(3);
    for (const name of ["a", "b", "c"])
      expect(existsSync(join(directory, `${name}.ended`))).toBe(false);
    await waitFor(
      "all to be gone",
      () => sh(`pgrep -af "$1" | grep -v "pgrep -af" || :`, directory) === "",
    );
  });

  test("one that stalls leaves the stream that others wait for, and gets it with the next run", async () => {
    const { source } = pair();
    sh(`head -c 5M /dev/urandom >"$1/large"`, source);
    const directory = temporaryDirectory();
    // It reads nothing the first time, until it is ended.
    const slow = `shell://if [ -e ${directory}/tried ]; then cat >${directory}/slow; else touch ${directory}/tried; sleep 1000; fi`;
    const { env, calls } = counted();
    const all = ["--json", "--timeout", "3", source, slow, `shell://cat >${directory}/quick`];
    const first = await expectRun(1, all, { env });
    expect(first.stderr).toContain("stuck: for 3 s no byte moved");
    expect(
      events(first)
        .filter(({ event }) => event === "transfer")
        .map(({ destination }) => destination),
    ).toEqual([`shell://cat >${directory}/quick`]);
    expect(calls("send")).toBe(1);
    await expectRun(0, [...all, "-S"], { env });
    expect(sh(`cmp "$1/slow" "$1/quick"; stat -c %s "$1/slow"`, directory)).toMatch(/^5\d{6}$/);
  });
});

test("a stream that is slow, but flows, is not taken for one that stalls", async () => {
  const { source, destination } = pair();
  sh(`head -c 3M /dev/urandom >"$1/large"`, source);
  const { env, calls } = counted();
  await expectRun(
    0,
    ["--protocol", "1", "--timeout", "4", source, "shell://pv -q -L 120k >/dev/null", destination],
    { env },
  );
  expect(calls("send")).toBe(1);
});

test("different streams flow side by side, at most --jobs at a time", async () => {
  const { source } = pair();
  const directory = temporaryDirectory();
  // Each waits for the others before it takes its stream.
  const meeting = (name: string) =>
    `shell://touch ${directory}/${name}; until [ -e ${directory}/a ] && [ -e ${directory}/b ] && [ -e ${directory}/c ]; do sleep 0.05; done; cat >/dev/null`;
  const each = (command: (name: string) => string) =>
    ["a", "b", "c"].flatMap((name, i) => ["--for", command(name), "--rate-limit", `${i + 1}g`]);
  await expectRun(0, ["-S", ...each(meeting), source]);
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", ...each(meeting), source]);
  // Each is alone, or fails.
  const alone = (name: string) =>
    `shell://mkdir ${directory}/alone && cat >/dev/null && sleep 0.2 && rmdir ${directory}/alone; : ${name}`;
  await expectRun(0, ["-S", "--jobs", "1", ...each(alone), source]);
  expect((await expectRun(2, ["--jobs", "0", source])).stderr).toContain(
    "--jobs takes a whole number from 1",
  );
});

test("who lacks more than others gets that by itself", async () => {
  const { source, snapshots, destination } = pair();
  const [behind, fresh] = [join(filesystem().path, "behind"), join(filesystem().path, "fresh")];
  for (const day of [1, 2, 3]) {
    snapshotAs(source, `2026010${day}-000000`);
    await expectRun(0, ["-S", source, destination, ...(day === 1 ? [behind] : [])]);
  }
  snapshotAs(source, "20260104-000000");
  const { env, calls } = counted();
  const all = events(
    await expectRun(0, ["-S", "--json", source, destination, behind, fresh], { env }),
  );
  expect(transfersTo(all, destination).map(({ name, parent }) => [name, parent])).toEqual([
    ["20260104-000000", "20260103-000000"],
  ]);
  expect(transfersTo(all, behind).length).toBe(3);
  expect(transfersTo(all, fresh).length).toBe(4);
  expect(calls("send")).toBe(8);
  for (const place of [destination, behind, fresh]) expectSound(place, snapshots);
  // Both lack all of it, and get all of it together.
  const both = [join(filesystem().path, "e"), join(filesystem().path, "f")];
  const second = counted();
  await expectRun(0, ["-S", source, ...both], { env: second.env });
  expect(second.calls("send")).toBe(4);
  for (const place of both) expectSound(place, snapshots);
});

test("Ctrl-C ends all that share a stream, and nothing is left of any", async () => {
  const { source, snapshots, destination } = pair();
  sh(`head -c 60M /dev/urandom >"$1/large"`, source);
  const other = join(filesystem().path, "other");
  const running = start([
    "--protocol",
    "1",
    source,
    destination,
    other,
    "shell://pv -q -L 5m >/dev/null",
  ]);
  const begun = (folder: string) =>
    existsSync(folder) && [...subvolumes(folder).values()].some(({ readonly }) => !readonly);
  await waitFor("both", () => begun(destination) && begun(other));
  running.child.kill("SIGINT");
  expect((await running.finished).status).toBe(130);
  for (const folder of [destination, other]) expect([...subvolumes(folder).keys()]).toEqual([]);
  await nextSecond();
  await expectRun(0, [source, destination, other]);
  for (const folder of [destination, other]) expectSound(folder, snapshots);
});

test("protocol 2 where both sides know it: what is compressed on the disk travels so; else, and when asked for, protocol 1", async () => {
  const [a, b] = [filesystem({ mount: "noatime,compress-force=zstd" }), filesystem()];
  const source = subvolume(join(a.path, "home"));
  fill(source);
  sh(`head -c 60M /dev/zero | tr '\\0' x >"$1/dull"`, source);
  const sent = async (to: string, args: readonly string[], env = {}) =>
    transfersTo(events(await expectRun(0, ["--json", ...args, source, to], { env })), to)[0]?.[
      "bytes"
    ] as number;
  snapshotAs(source, "20260101-000000");
  const short = await sent(join(b.path, "short"), ["-S"]);
  const long = await sent(join(b.path, "long"), ["-S", "--protocol", "1"]);
  expect([short < 8e6, long > 60e6]).toEqual([true, true]);
  const log = counted();
  const tools = join(log.env["PATH"]?.split(":")[0] as string, "btrfs");
  // Whose btrfs-progs are old is not sent what they do not know.
  writeFileSync(
    tools,
    readFileSync(tools, "utf8").replace(
      "exec",
      'if [ "$1" = --version ]; then echo "btrfs-progs v5.16"; exit; fi; exec',
    ),
  );
  expect(await sent(join(b.path, "old"), ["-S"], log.env)).toBeGreaterThan(60e6);
  expect(log.calls("send -q -p") + log.calls("send -q ./")).toBe(1);
  for (const place of ["short", "long", "old"])
    expect(contentsDigest(join(b.path, place, "20260101-000000"))).toBe(contentsDigest(source));
  await expectRun(0, ["verify", source, join(b.path, "short")]);
  // Back again, the same way.
  const back = events(
    await expectRun(0, [
      "restore",
      "--json",
      join(b.path, "short"),
      join(filesystem().path, "back"),
    ]),
  );
  expect(back.find(({ event }) => event === "transfer")?.["bytes"]).toBeLessThan(8e6);
});

test("what a guard does not let through compressed is sent once more without, by itself", async () => {
  const [a, b] = [filesystem({ mount: "noatime,compress-force=lzo" }), filesystem()];
  const source = subvolume(join(a.path, "home"));
  sh(`head -c 10M /dev/zero | tr '\\0' x >"$1/dull"`, source);
  const { guarded, url } = await sshServer();
  const options = guarded("--path", b.path);
  const place = join(b.path, "home");
  const first = await expectRun(0, [...options, source, url(place)]);
  expect(first.stderr).toContain("once more with protocol 1");
  expect(contentsDigest(join(place, snapshotNames(place)[0] as string))).toBe(
    contentsDigest(source),
  );
  await nextSecond();
  expect(
    (await expectRun(1, [...options, "--protocol", "2", "-I", source, url(place)])).stderr,
  ).toContain("--protocol 1 sends without");
});
