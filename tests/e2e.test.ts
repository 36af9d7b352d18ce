// The whole job once, by each way of running the program.

import { expect, test } from "bun:test";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import {
  change,
  events,
  expectRun,
  expectSound,
  nextSecond,
  pair,
  ROOT,
  sh,
  snapshotNames,
  sshServer,
  start,
  temporaryDirectory,
  type How,
  type Options,
} from "./support/rig.ts";
import { generator } from "./support/random.ts";

async function wholeJob(options: Options): Promise<void> {
  const { source, snapshots, destination, b } = pair();
  const { options: ssh, url } = await sshServer();
  const random = generator(11);
  const out = temporaryDirectory();
  const args = [
    "--json",
    "-N",
    "2",
    "-n",
    "2",
    ...ssh,
    source,
    destination,
    url(join(b.path, "pushed")),
    `shell://cat >${out}/$BTRFS_BACKUP_NAME`,
  ];
  for (let i = 0; i < 3; i++) {
    const result = await expectRun(0, args, options);
    expect(events(result).at(-1)).toMatchObject({ event: "summary", ok: true, transfers: 3 });
    change(source, random);
    await nextSecond();
  }
  for (const folder of [destination, join(b.path, "pushed")]) {
    expect(snapshotNames(folder).length).toBe(2);
    expectSound(folder, snapshots);
  }
  expect(sh(`ls "$1" | wc -l`, out)).toBe("3");
  await expectRun(2, ["--nonsense", source], options);
  const failing = await expectRun(1, ["-S", source, "shell://false"], options);
  expect(failing.stderr).toContain("shell://false failed with exit status 1");
  const running = start([source, "shell://sleep 100"], options);
  while (!running.stderr().includes("Sending")) await Bun.sleep(10);
  running.child.kill("SIGTERM");
  expect((await running.finished).status).toBe(143);
}

for (const how of [
  "bun",
  "binary",
  "baseline",
  "arm64",
  "deno",
  "one file by bun",
  "one file by deno",
  "one file by node",
] as How[])
  test(`by ${how}`, () => wholeJob({ how }));

test("by Deno, in a clone without node_modules", async () => {
  const clone = join(temporaryDirectory(), "clone");
  sh(
    `mkdir "$2"; cd "$1"; cp btrfs-backup.ts package.json package-lock.json deno.json tsconfig.json "$2"`,
    ROOT,
    clone,
  );
  expect(
    sh(
      `cd "$2"; "$1/node_modules/.bin/deno" run -A btrfs-backup.ts --version 2>/dev/null; "$1/node_modules/.bin/deno" check --quiet btrfs-backup.ts; ls -d node_modules 2>/dev/null || :`,
      ROOT,
      clone,
    ),
  ).toMatch(/^btrfs-backup \d+\.\d+\.\d+ \(from source, Deno [\d.]+\)$/);
});

test("a second build of the same commit, elsewhere, gives the same bytes: here, for another machine, and for another libc", () => {
  const elsewhere = temporaryDirectory();
  sh(
    `cd "$1"; cp -rp *.ts *.json *.md LICENSE scripts $(ls -d .git 2>/dev/null) "$2"; ln -s "$PWD/node_modules" "$2/node_modules"; cd "$2"; scripts/build all linux-arm64 linux-x64-musl >/dev/null 2>&1`,
    ROOT,
    elsewhere,
  );
  const built = readdirSync(join(elsewhere, "dist")).toSorted();
  expect(built).toEqual(
    [
      "_btrfs-backup",
      "btrfs-backup",
      "btrfs-backup-guide.7",
      "btrfs-backup-linux-arm64",
      "btrfs-backup-linux-x64-musl",
      "btrfs-backup.8",
      "btrfs-backup.bash",
      "btrfs-backup.fish",
      "btrfs-backup.js",
    ].toSorted(),
  );
  for (const file of built) sh(`cmp "$1/dist/$3" "$2/dist/$3"`, elsewhere, ROOT, file);
  expect(
    sh(
      `cd "$1/dist"; sha256sum --check --quiet SHA256SUMS; wc -l <SHA256SUMS; file -b btrfs-backup-linux-arm64 | grep -o aarch64 || :`,
      ROOT,
    ),
  ).toMatch(/^18/);
});
