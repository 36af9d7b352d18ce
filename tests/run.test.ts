// The main job: snapshot, send the difference, keep what should be kept.

import { expect, test } from "bun:test";
import { join } from "node:path";
import { events, expectRun, expectSameTree, expectSound, filesystem, fill, nextSecond, pair, sh, snapshotNames, subvolume, subvolumes } from "./support/rig.ts";

test("a second run of a 1 GiB source sends only the difference, and both backups are the snapshots", async () => {
  const [a, b] = [filesystem({ size: "4G" }), filesystem({ size: "4G" })];
  const source = subvolume(join(a.path, "home"));
  const backups = join(b.path, "backup");
  fill(source);
  sh(`head -c 1G /dev/urandom >"$1/large"`, source);
  const first = events(await expectRun(0, ["--json", source, backups]));
  expect(first.find(({ event }) => event === "transfer")).toMatchObject({ parent: null });
  sh(`head -c 1M /dev/urandom | dd of="$1/large" bs=1M seek=500 conv=notrunc 2>/dev/null`, source);
  await nextSecond();
  const second = events(await expectRun(0, ["--json", source, backups]));
  const transfer = second.find(({ event }) => event === "transfer");
  const [old, young] = snapshotNames(backups);
  expect(transfer).toMatchObject({ parent: old, name: young });
  expect(transfer?.["bytes"]).toBeLessThan(3 << 20);
  // The measured figure is the stream's own size.
  expect(transfer?.["bytes"]).toBe(Number(sh(`btrfs send -q -p "$1/$2" "$1/$3" | wc -c`, join(source, "snapshot"), old ?? "", young ?? "")));
  expect(snapshotNames(join(source, "snapshot"))).toEqual([old as string, young as string]);
  expectSound(backups, join(source, "snapshot"));
  console.log(`the second stream: ${transfer?.["bytes"]} bytes`);
});

test("a snapshot is read-only, and the same as the source at that moment", async () => {
  const { source, snapshots } = pair();
  await expectRun(0, [source]);
  const [[name, snapshot] = ["", null]] = [...subvolumes(snapshots)];
  expect(snapshot).toMatchObject({ readonly: true, receivedUuid: null });
  sh(`rm -rf "$1/.btrfs-backup"* && cd "$2" && find . -name '.btrfs-backup*' -print | wc -l`, snapshots, join(snapshots, name));
  expectSameTree(join(source, "plain"), join(snapshots, name, "plain"));
});
