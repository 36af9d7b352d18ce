// Disks that fail: the error names the cause and the place, nothing complete is touched, the other
// destinations are served, and the next run after the repair is ordinary and incremental.

import { expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  expectRun,
  expectSound,
  filesystem,
  mountImage,
  nextSecond,
  pair,
  sh,
  snapshotNames,
  start,
  subvolume,
  subvolumes,
  transfers,
  unmount,
  waitFor,
  logged,
} from "./support/rig.ts";

const incomplete = (folder: string) =>
  [...subvolumes(folder)].find(([, { readonly }]) => !readonly);

/** A first backup to two places, and a large second one to the first of them that is under way. */
async function underWay() {
  const made = pair();
  const { source, snapshots, destination } = made;
  const other = join(filesystem().path, "other");
  await expectRun(0, [source, destination, other]);
  const [first = ""] = snapshotNames(snapshots);
  sh(`head -c 40M /dev/urandom >"$1/large"`, source);
  await nextSecond();
  const running = start(["--rate-limit", "10m", source, destination, other]);
  await waitFor("the transfer", () => incomplete(destination) !== undefined);
  /** What every kind of failure must come to. */
  const expectRepaired = async (said: RegExp, repair: () => void) => {
    const { status, stderr } = await running.finished;
    expect([status, stderr]).toEqual([1, expect.stringMatching(said)]);
    expect(stderr).toContain(destination);
    repair();
    expect(subvolumes(destination).get(first)).toMatchObject({ readonly: true });
    expect(snapshotNames(other).length).toBe(2); // it was served
    await nextSecond();
    const again = await expectRun(0, ["--json", source, destination, other]);
    for (const { parent } of transfers(again)) expect(parent).not.toBeNull();
    for (const folder of [destination, other]) {
      expect(snapshotNames(folder)).toEqual(snapshotNames(snapshots));
      expectSound(folder, snapshots);
    }
  };
  return { ...made, expectRepaired };
}

test("a quota that is exceeded in mid-transfer", async () => {
  const { destination, b, expectRepaired } = await underWay();
  sh(
    `btrfs quota enable "$1"; btrfs quota rescan -w "$1" >/dev/null; btrfs qgroup limit 1M "0/$2" "$1"`,
    b.path,
    String(incomplete(destination)?.[1].id),
  );
  await expectRepaired(/Disk quota exceeded/, () => sh(`btrfs quota disable "$1"`, b.path));
});

test("a destination that becomes read-only in mid-transfer", async () => {
  const { b, expectRepaired } = await underWay();
  // Read-only from one moment to the next, as btrfs makes itself after an error; who still writes must end for that.
  const receivers = `for p in $(pgrep -f "^btrfs receive "); do if grep -q " /proc/fs .* $(findmnt -no SOURCE "$1") " "/proc/$p/mountinfo"; then kill -KILL "$p"; fi; done`;
  sh(`while ! mount -o remount,ro "$1" 2>/dev/null; do ${receivers}; done`, b.path);
  await expectRepaired(/Read-only file system|Killed/, () =>
    sh(`mount -o remount,rw "$1"`, b.path),
  );
});

test("umount -l in mid-transfer", async () => {
  const { destination, b, expectRepaired } = await underWay();
  sh(`umount -l "$1"`, b.path);
  await expectRepaired(/another filesystem or directory is at|is the disk mounted\?/, () =>
    sh(
      `while ! mount -o loop,noatime "$1" "$2" 2>/dev/null; do sleep 0.1; done; [ -d "$3" ]`,
      b.image,
      b.path,
      destination,
    ),
  );
});

test("a source that cannot be read: Input/output error", async () => {
  const { source, snapshots, destination, a } = pair();
  const other = join(filesystem().path, "other");
  await expectRun(0, [source, destination, other]);
  const [first = ""] = snapshotNames(snapshots);
  sh(`yes "what a disk forgets" | head -n 500000 >"$1/large" || :; sync`, source);
  unmount(a);
  // The sectors of that file have something else in them: EIO for whoever reads it, by its checksums.
  const offset = sh(`grep -abom 1 "what a disk forgets" "$1" | head -n 1 | cut -d : -f 1`, a.image);
  sh(
    `dd if="$1" of="$1.good" bs=4096 skip=$(($2 / 4096)) count=64 2>/dev/null; dd if=/dev/zero of="$1" bs=4096 seek=$(($2 / 4096)) count=64 conv=notrunc 2>/dev/null`,
    a.image,
    offset,
  );
  mountImage(a);
  await nextSecond();
  const failed = await expectRun(1, [source, destination, other]);
  expect(logged(failed.stderr).match(/btrfs send failed .*Input\/output error/g)?.length).toBe(2);
  for (const folder of [destination, other])
    expect([...subvolumes(folder).keys()]).toEqual([first]);
  unmount(a);
  sh(
    `dd if="$1.good" of="$1" bs=4096 seek=$(($2 / 4096)) conv=notrunc 2>/dev/null`,
    a.image,
    offset,
  );
  mountImage(a);
  await nextSecond();
  const again = await expectRun(0, ["--json", source, destination, other]);
  expect(transfers(again).map(({ parent }) => parent === null)).toEqual([
    false,
    false,
    false,
    false,
  ]);
  for (const folder of [destination, other]) expectSound(folder, snapshots);
});

test("a stream that becomes smaller on the disk leaves the room for the next one", async () => {
  const source = subvolume(join(filesystem({ mount: "compress=zstd" }).path, "home"));
  const small = join(filesystem({ size: "150M", mount: "compress=zstd" }).path, "small");
  sh(`head -c 300M /dev/zero >"$1/zeros"`, source);
  await expectRun(0, [source]);
  await nextSecond();
  writeFileSync(join(source, "another"), "");
  await expectRun(0, ["--protocol", "1", source, small]);
  expect(snapshotNames(small).length).toBe(2);
});

test("what clearly lacks the space is refused with both figures, and tried only with --skip-space-check", async () => {
  const { source, destination } = pair();
  const small = join(filesystem({ size: "150M" }).path, "small");
  sh(
    `btrfs quota enable "$1"; head -c 200M /dev/urandom >"$1/large"; sync; btrfs quota rescan -w "$1" >/dev/null`,
    source,
  );
  const refused = await expectRun(1, [source, small, destination]);
  expect(refused.stderr).toMatch(
    /takes 20\d\.\dM, and only \d+\.\dM are free there; --skip-space-check/,
  );
  expect([...subvolumes(small).keys()]).toEqual([]);
  expect(snapshotNames(destination).length).toBe(1);
  await nextSecond();
  const tried = await expectRun(1, ["--skip-space-check", "--newest-only", source, small]);
  expect(tried.stderr).toContain("No space left on device");
  sh(`rm "$1/large"; sync; btrfs quota rescan -w "$1" >/dev/null`, source);
  await nextSecond();
  await expectRun(0, ["--newest-only", source, small, destination]);
  expect(snapshotNames(small).length).toBe(1);
});

test("a full destination with a leftover frees it first, whatever order its record has", async () => {
  const { source, a } = pair();
  const small = filesystem({ size: "120M", mkfs: ["--mixed"] });
  const destination = join(small.path, "backup");
  sh(`rm -rf "$1/plain"; echo x >"$1/file"`, source);
  await expectRun(0, [source, destination]);
  const [first = ""] = snapshotNames(destination);
  const leftover = first.replace(/^\d{4}/, "2025");
  const file = join(destination, ".btrfs-backup.json");
  sh(
    `sed -i 's/{"owner"\\(.*\\)}$/{"receiving":"'"$2"'","owner"\\1}/' "$1"; btrfs -q subvolume create "$3/$2" >/dev/null; sync -f "$3"`,
    file,
    leftover,
    destination,
  );
  expect(readFileSync(file, "utf8")).toContain(`{"receiving":"${leftover}","owner"`);
  // Not a byte is left.
  sh(
    `cat /dev/zero >"$1/ballast" 2>/dev/null || :; sync -f "$1"; for i in $(seq 400); do head -c 2000 /dev/zero >"$1/b$i" 2>/dev/null || break; done; sync -f "$1" || :`,
    join(destination, leftover),
  );
  await nextSecond();
  sh(`echo y >"$1/file"`, source);
  await expectRun(0, ["--skip-space-check", source, destination]);
  expect([...subvolumes(destination).keys()]).toEqual([
    first,
    ...snapshotNames(destination).slice(1),
  ]);
  expect(snapshotNames(destination).length).toBe(2);
  expect(a.path).not.toBe(small.path);
});
