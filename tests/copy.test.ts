// Backups are sent on: to a second disk, to another server; and a copy is as good as the first.

import { expect, test } from "bun:test";
import { existsSync, rmSync } from "node:fs";
import { join } from "node:path";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSameTree,
  expectSound,
  filesystem,
  holdLock,
  nextSecond,
  pair,
  reformat,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolumes,
  transfers,
} from "./support/rig.ts";
import { generator } from "./support/random.ts";
import { day } from "./support/names.ts";

test("missing ones only, incrementally, over ssh; a copy of a copy restores, and the source goes on in it", async () => {
  const { source, snapshots, destination, a } = pair();
  const [second, third] = [join(filesystem().path, "second"), join(filesystem().path, "third")];
  const { options, url } = await sshServer();
  const random = generator(4);
  const more = async () => {
    change(source, random);
    await nextSecond();
    await expectRun(0, [source, destination]);
  };
  await more();
  await more();
  const names = () => snapshotNames(snapshots);
  expect(
    transfers(await expectRun(0, ["copy", "--json", ...options, destination, url(second)])).map(
      ({ name, parent }) => [name, parent],
    ),
  ).toEqual([
    [names()[0], null],
    [names()[1], names()[0]],
  ]);
  await more();
  const next = await expectRun(0, ["copy", "--json", ...options, destination, url(second)]);
  expect(transfers(next).map(({ name, parent }) => [name, parent])).toEqual([
    [names()[2], names()[1]],
  ]);
  expect(events(next).at(-1)).toMatchObject({ event: "summary", ok: true, transfers: 1 });
  expect(
    transfers(await expectRun(0, ["copy", "--json", ...options, destination, url(second)])),
  ).toEqual([]);
  await expectRun(0, ["copy", second, third]);
  for (const folder of [destination, second, third]) {
    expect(snapshotNames(folder)).toEqual(names());
    expectSound(folder, snapshots);
  }
  // The source goes on where the copy stopped.
  await nextSecond();
  const last = names().at(-1);
  expect(
    transfers(await expectRun(0, ["--json", source, third, second, destination])),
  ).toMatchObject([{ parent: last }, { parent: last }, { parent: last }]);
  const state = contentsDigest(source);
  reformat(a);
  await expectRun(0, ["restore", third, source]);
  expect(contentsDigest(source)).toBe(state);
  await nextSecond();
  expect(
    transfers(await expectRun(0, ["--json", source, destination, second])).map(
      ({ parent }) => parent === null,
    ),
  ).toEqual([false, false]);
}, 60_000);

test("--newest-only, -n, --dry-run, and every prefix unless one is given", async () => {
  const { source, destination } = pair();
  const disk = filesystem();
  for (const n of [1, 2, 3, 4])
    for (const prefix of ["a-", "b-"]) snapshotAs(source, `${prefix}${day(n)}`);
  for (const prefix of ["a-", "b-"]) await expectRun(0, ["-S", "-p", prefix, source, destination]);
  const to = (name: string) => join(disk.path, name);
  await expectRun(0, ["copy", "--dry-run", destination, to("dry")]);
  expect(existsSync(to("dry"))).toBe(false);
  await expectRun(0, ["copy", "--newest-only", destination, to("newest")]);
  expect([...subvolumes(to("newest")).keys()]).toEqual([`a-${day(4)}`, `b-${day(4)}`]);
  await expectRun(0, ["copy", "-p", "a-", "-n", "2", destination, to("two")]);
  expect([...subvolumes(to("two")).keys()]).toEqual([`a-${day(3)}`, `a-${day(4)}`]);
  await expectRun(0, ["copy", destination, to("all")]);
  expect([...subvolumes(to("all")).keys()]).toEqual([...subvolumes(destination).keys()]);
  expectSameTree(join(destination, `b-${day(2)}`), join(to("all"), `b-${day(2)}`));
});

test("what was copied on last stays for the next copy, whatever the policy says", async () => {
  const { source, snapshots, destination } = pair();
  const second = join(filesystem().path, "second");
  await expectRun(0, [source, destination]);
  const [copied = ""] = snapshotNames(destination);
  await expectRun(0, ["copy", destination, second]);
  for (let i = 0; i < 3; i++) {
    await nextSecond();
    await expectRun(0, ["-N", "1", "-n", "1", source, destination]);
  }
  expect(snapshotNames(destination)).toEqual([copied, snapshotNames(snapshots).at(-1) as string]);
  expect(transfers(await expectRun(0, ["copy", "--json", destination, second]))).toMatchObject([
    { parent: copied },
  ]);
});

test("from a disk that is mounted read-only; one prefix that is busy does not stop the others", async () => {
  const { source, destination, b } = pair();
  for (const prefix of ["a-", "b-"]) await expectRun(0, ["-p", prefix, source, destination]);
  const second = join(filesystem().path, "second");
  const release = await holdLock(`${destination}/.btrfs-backup.a-.lock`);
  expect((await expectRun(1, ["copy", destination, second])).stderr).toContain("another run holds");
  expect([snapshotNames(second, "a-").length, snapshotNames(second, "b-").length]).toEqual([0, 1]);
  await release();
  sh(`mount -o remount,ro "$1"`, b.path);
  await expectRun(0, ["copy", "-n", "1", destination, second]);
  expect([snapshotNames(second, "a-").length, snapshotNames(second, "b-").length]).toEqual([1, 1]);
  sh(`mount -o remount,rw "$1"`, b.path);
});

test("what makes no sense is refused before anything is written", async () => {
  const { source, snapshots, destination, b } = pair();
  await expectRun(0, [source, destination]);
  expect((await expectRun(2, ["copy", source, join(b.path, "x")])).stderr).toContain(
    "--no-snapshot",
  );
  expect((await expectRun(2, ["copy", snapshots, join(b.path, "x")])).stderr).toContain(
    "--no-snapshot",
  );
  await expectRun(2, ["copy", destination]);
  await expectRun(0, ["-p", "p-", source]);
  sh(`btrfs -q subvolume delete "$1"/2* >/dev/null`, snapshots);
  expect((await expectRun(2, ["copy", snapshots, join(b.path, "x")])).stderr).toContain(
    "--no-snapshot",
  );
  await expectRun(2, ["copy", destination, join(destination, "inside")]);
  expect((await expectRun(1, ["copy", destination, join(b.path, "same")])).stderr).toContain(
    "on the filesystem of",
  );
  expect((await expectRun(1, ["copy", b.path, join(filesystem().path, "x")])).stderr).toContain(
    `there are no backups in ${b.path}; ${destination} has some`,
  );
  expect(snapshotNames(b.path)).toEqual([]);
  expect(existsSync(join(b.path, "same"))).toBe(false);
  // Another source's backups stand there.
  const other = pair();
  await expectRun(0, [other.source, other.destination]);
  expect((await expectRun(1, ["copy", destination, other.destination])).stderr).toContain(
    "belong to",
  );
});

test("backups of 0.3.1, which say nothing of their source, are copied as well, and stay free for it", async () => {
  const { source, destination } = pair();
  const second = join(filesystem().path, "second");
  await expectRun(0, [source, destination]);
  rmSync(join(destination, ".btrfs-backup.json"));
  const name = snapshotNames(destination)[0];
  await expectRun(0, ["copy", destination, second]);
  expect(transfers(await expectRun(0, ["copy", "--json", destination, second]))).toEqual([]);
  expect(existsSync(join(destination, ".btrfs-backup.json"))).toBe(false);
  await nextSecond();
  expect(transfers(await expectRun(0, ["--json", "--adopt", source, second]))).toMatchObject([
    { parent: name },
  ]);
  sh(`rm -f "$1/.btrfs-backup.json"`, join(source, "snapshot"));
  expect(transfers(await expectRun(0, ["--json", "-S", source, destination]))).toMatchObject([
    { parent: name },
  ]);
});
