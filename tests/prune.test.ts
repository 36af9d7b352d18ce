// prune, without a source: by the times when backups arrived, which nobody who may only add can make up.

import { expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSound,
  filesystem,
  nextSecond,
  pair,
  run,
  s3Remote,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolumes,
  temporaryDirectory,
} from "./support/rig.ts";
import { seeded, soak } from "./support/random.ts";

const deleted = (result: Parameters<typeof events>[0]) =>
  events(result)
    .filter(({ event }) => event === "delete")
    .map(({ name }) => name);

test("a flood of backups with dates of all times pushes no real one out of a window or a calendar", async () => {
  const { source, destination } = pair();
  const args = ["-S", source, destination];
  const real = ["20260101-000000", "20260102-000000"];
  for (const name of real) snapshotAs(source, name);
  await expectRun(0, args);
  const flood = [2019, 2020, 2021, 2050, 2099, 3000].flatMap((year) => [
    `${year}0101-000000`,
    `${year}0601-000000`,
  ]);
  for (const name of flood) snapshotAs(source, name);
  await expectRun(0, args);
  expect(deleted(await expectRun(0, ["prune", "--json", "-n", "14d+", destination]))).toEqual([]);
  // All of them arrived this year: by name, ten years would have kept ten, and not the real ones.
  const gone = deleted(
    await expectRun(0, ["prune", "--json", "--dry-run", "-n", "2y", destination]),
  );
  expect(gone).not.toContain(real[0]);
  expect(gone.length).toBe(real.length + flood.length - 2);
  expect(snapshotNames(destination).length).toBe(real.length + flood.length);
  // What arrived last is the newest, whatever its name says.
  snapshotAs(source, "20260103-000000");
  await expectRun(0, args);
  await expectRun(0, ["prune", "-n", "1", destination]);
  expect(snapshotNames(destination)).toEqual(["20260103-000000"]);
  // And the source goes on, incrementally.
  snapshotAs(source, "20260104-000000");
  expect(
    events(await expectRun(0, ["--json", "--newest-only", ...args])).find(
      ({ event }) => event === "transfer",
    ),
  ).toMatchObject({ parent: "20260103-000000" });
});

test("every prefix, or one; over ssh; strangers, what was renamed, leftovers and foreign things stay", async () => {
  const { source, destination, a, b } = pair();
  const { options, url } = await sshServer();
  const second = join(filesystem().path, "second");
  for (const prefix of ["a-", "b-"]) {
    for (const day of [1, 2, 3]) snapshotAs(source, `${prefix}2026010${day}-000000`);
    await expectRun(0, ["-S", "-p", prefix, source, destination]);
  }
  await expectRun(0, ["copy", "-p", "a-", "--newest-only", destination, second]);
  sh(
    `cd "$1"; mv b-20260101-000000 keep; mkdir a-20250101-000000 foreign; btrfs -q subvolume create b-20250101-000000 >/dev/null`,
    destination,
  );
  expect(
    deleted(
      await expectRun(0, ["prune", "--json", "-n", "1", "-p", "b-", ...options, url(destination)]),
    ),
  ).toEqual(["b-20260102-000000"]);
  expect([...subvolumes(destination).keys()]).toEqual([
    "a-20260101-000000",
    "a-20260102-000000",
    "a-20260103-000000",
    "b-20250101-000000",
    "b-20260103-000000",
    "keep",
  ]);
  expect(deleted(await expectRun(0, ["prune", "--json", "-n", "1", destination]))).toEqual([
    "a-20260101-000000",
    "a-20260102-000000",
  ]);
  // A stranger: adopted beside another source's backups.
  const other = join(a.path, "other");
  sh(`btrfs -q subvolume create "$1" >/dev/null`, other);
  await nextSecond();
  await expectRun(0, ["-p", "a-", "--adopt", other, destination]);
  expect(deleted(await expectRun(0, ["prune", "--json", "-n", "1", destination]))).toEqual([]);
  expect(readdirSync(destination)).toEqual(
    expect.arrayContaining(["a-20250101-000000", "foreign", "keep"]),
  );
  expect(existsSync(join(b.path, "backup", "a-20260103-000000"))).toBe(true);
});

test("streams go by when they were written, chain by chain", async () => {
  const { source } = pair();
  const s3 = await s3Remote();
  const folder = temporaryDirectory();
  for (const name of ["20990101-000000", "20990102-000000", "20260101-000000", "20260102-000000"]) {
    snapshotAs(source, name);
    await expectRun(0, ["-S", "--full-every", "2", source, `raw://${folder}`, s3.url("s")], s3);
    await nextSecond();
  }
  expect(deleted(await expectRun(0, ["prune", "--json", "-n", "1", `raw://${folder}`]))).toEqual([
    "20990102-000000",
    "20990101-000000",
  ]);
  expect(
    readdirSync(folder)
      .filter((name) => name.endsWith(".btrfs"))
      .map((name) => name.slice(0, 8))
      .sort(),
  ).toEqual(["20260101", "20260102"]);
  await expectRun(0, ["verify", `raw://${folder}`]);
  // rclone's listing has no times that could be trusted: by name.
  expect(deleted(await expectRun(0, ["prune", "--json", "-n", "1", s3.url("s")], s3))).toEqual([
    "20260102-000000",
    "20260101-000000",
  ]);
  await expectRun(0, ["verify", s3.url("s")], s3);
});

test("what cannot be pruned is refused", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, [source, destination]);
  expect((await expectRun(2, ["prune", destination])).stderr).toContain("-n POLICY");
  expect((await expectRun(2, ["prune", "-n", "0", destination])).stderr).toContain("-n POLICY");
  for (const place of [source, snapshots])
    expect((await expectRun(2, ["prune", "-n", "1", place])).stderr).toContain(
      "snapshots of a source",
    );
  expect((await expectRun(1, ["prune", "-n", "1", `${destination}-missing`])).stderr).toContain(
    "no such directory",
  );
  // Nothing is there, but one level deeper: nobody believes that it was pruned.
  const high = await expectRun(0, ["prune", "-q", "-n", "1", dirname(destination)]);
  expect(high.stderr).toContain(`there are no backups in it; ${destination} has some; --recursive`);
  await nextSecond();
  await expectRun(0, [source, destination]);
  sh(`echo x >>"$1/.btrfs-backup.json"`, destination);
  expect((await expectRun(1, ["prune", "-n", "1", destination])).stderr).toContain(
    "cannot be read",
  );
  expect(snapshotNames(destination).length).toBe(2);
});

test("a snapshot that is dated in the future is warned about, and empties no calendar", async () => {
  const { source, snapshots, destination } = pair();
  for (const name of ["20260101-000000", "20260102-000000", "20990101-000000"])
    snapshotAs(source, name);
  const result = await expectRun(0, ["-N", "2d", "-n", "2d", source, destination]);
  expect(result.stderr).toContain("dated in the future: 20990101-000000");
  // The clock leapt twice: nothing goes.
  expect(snapshotNames(snapshots).length).toBe(4);
  const now = snapshotNames(snapshots).find(
    (name) => name > "20260103" && !name.startsWith("2099"),
  ) as string;
  expect(snapshotNames(destination)).toContain(now);
  await nextSecond();
  const next = events(
    await expectRun(0, ["--json", "-N", "2d", "-n", "2d", source, destination]),
  ).find(({ event }) => event === "transfer");
  expect(next).toMatchObject({ parent: now });
});

test("runs, prunes and restores of one chain at a time, in loops: each waits or leaves, nothing breaks", async () => {
  const { source, snapshots, destination, b } = pair();
  const stored = join(filesystem().path, "stored");
  const random = seeded();
  await expectRun(0, ["-N", "3", source, destination, `raw://${stored}`]);
  for (let i = 0; i < soak(4); i++) {
    change(source, random);
    await nextSecond();
    const wait = i % 2 === 0 ? ["--wait", "60"] : [];
    const target = join(b.path, `restored-${i}`);
    const results = await Promise.all([
      run([
        ...wait,
        "-N",
        "3",
        "-n",
        "3",
        "--full-every",
        "2",
        source,
        destination,
        `raw://${stored}`,
      ]),
      run(["prune", ...wait, "-n", "2", destination]),
      run(["prune", ...wait, "-n", "2", `raw://${stored}`]),
      run(["restore", ...wait, destination, target]),
      run(["restore", ...wait, `raw://${stored}`, `${target}-too`]),
    ]);
    const statuses = results.map(({ status }) => status as number);
    if (wait.length > 0)
      expect([statuses, results.map(({ stderr }) => stderr)]).toEqual([
        [0, 0, 0, 0, 0],
        expect.anything(),
      ]);
    for (const status of statuses) expect([0, 1, 3]).toContain(status);
    for (const { status, stderr } of results)
      if (status !== 0) expect(stderr).toMatch(/another run holds|still/);
    expectSound(destination, snapshots);
    for (const folder of [target, `${target}-too`]) {
      if (!existsSync(folder)) continue;
      const [name = ""] = snapshotNames(join(folder, "snapshot"));
      if (snapshotNames(snapshots).includes(name))
        expect(contentsDigest(folder)).toBe(contentsDigest(join(snapshots, name)));
    }
  }
  await expectRun(0, ["-S", source, destination, `raw://${stored}`]);
  await expectRun(0, ["verify", source, destination, `raw://${stored}`]);
});

test("what was received as a difference takes no process of its own to tell when, here and with a key", async () => {
  const { source, destination } = pair();
  const { guarded, url } = await sshServer();
  for (let day = 1; day <= 9; day++) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination]);
  const tools = temporaryDirectory();
  const calls = join(tools, "calls");
  writeFileSync(
    join(tools, "btrfs"),
    `#!/bin/sh\nPATH=\${PATH#*:}\necho "$*" >>${calls}\nexec btrfs "$@"\n`,
    { mode: 0o755 },
  );
  // A zone in which an hour comes twice.
  const env = { PATH: `${tools}:${process.env["PATH"]}`, TZ: "Europe/Berlin" };
  expect(
    deleted(await expectRun(0, ["prune", "--json", "--dry-run", "-n", "4", destination], { env }))
      .length,
  ).toBe(5);
  expect(readFileSync(calls, "utf8")).not.toContain("subvolume show");
  // Where stat does not tell when a directory was made, btrfs-progs does.
  writeFileSync(
    join(tools, "stat"),
    `#!/bin/sh\ncase $2 in %W*) shift 3; for name; do echo "0 $name"; done;; *) PATH=\${PATH#*:}; exec stat "$@";; esac\n`,
    { mode: 0o755 },
  );
  expect(
    deleted(await expectRun(0, ["prune", "--json", "--dry-run", "-n", "4", destination], { env }))
      .length,
  ).toBe(5);
  expect(readFileSync(calls, "utf8").match(/subvolume show/g)?.length).toBe(1); // of the first, which is in full
  const key = guarded("--path", destination, "--allow-delete", "--allow-read");
  await expectRun(0, ["prune", "-n", "4", ...key, url(destination)]);
  expect(snapshotNames(destination)).toEqual([
    "20260106-000000",
    "20260107-000000",
    "20260108-000000",
    "20260109-000000",
  ]);
});
