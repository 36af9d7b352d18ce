// A source and the subvolumes below it, backed up as one tree.

import { existsSync, linkSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expectRun, sh } from "./rig.ts";

export type TreeRun = {
  readonly source: string;
  /** The subvolumes below it that are there, by their paths. */
  readonly members: readonly string[];
  /** The name that all snapshots of the run get. */
  readonly name: string;
  /** Folders of btrfs, or raw:// stores. */
  readonly destinations: readonly string[];
  readonly prefix?: string;
  /** Outside of SOURCE, which is a plain directory then. */
  readonly folder?: string;
  /** Those that went, and from which run on. */
  readonly gone?: Readonly<Record<string, string>>;
};

/** Writes into a root's record that it is a tree. */
function markTree(folder: string, prefix: string, gone: Readonly<Record<string, string>>): void {
  const file = join(folder, ".btrfs-backup.json");
  const key = `,${JSON.stringify(prefix)}: `;
  const lines = existsSync(file)
    ? readFileSync(file, "utf8").trimEnd().split("\n").slice(1, -1)
    : [];
  const own = lines.find((line) => line.startsWith(key))?.slice(key.length) ?? "{}";
  const chain = { ...JSON.parse(own), tree: { gone } };
  const others = lines.filter((line) => !line.startsWith(key));
  const all = [`{"/": 1`, ...others, key + JSON.stringify(chain), "}", ""];
  writeFileSync(file, all.join("\n"));
}

/** One run of a tree: snapshots of one moment, and backups of each. */
export async function makeTree({
  source,
  members,
  name,
  destinations,
  prefix = "",
  folder,
  gone = {},
}: TreeRun): Promise<void> {
  const snapshots = folder ?? join(source, "snapshot");
  const lock = `.btrfs-backup.${prefix}.lock`;
  const all = folder === undefined ? ["", ...members] : members;
  mkdirSync(snapshots, { recursive: true });
  writeFileSync(join(snapshots, lock), "");
  const own = (path: string) =>
    path !== "" && existsSync(join(source, path, "snapshot"))
      ? join(source, path, "snapshot")
      : join(snapshots, path);
  for (const path of all) {
    mkdirSync(own(path), { recursive: true });
    if (own(path) === join(snapshots, path) && !existsSync(join(own(path), lock)))
      linkSync(join(snapshots, lock), join(own(path), lock));
    sh(
      `btrfs -q subvolume snapshot -r "$1" "$2" >/dev/null`,
      join(source, path),
      join(own(path), name),
    );
  }
  for (const destination of destinations)
    for (const path of all) {
      const local = destination.replace("raw://", "");
      mkdirSync(join(local, path), { recursive: true });
      const from = join(source, path);
      const to = path === "" ? destination : `${destination}/${path}`;
      await expectRun(0, ["-q", "-S", "-p", prefix, "-f", own(path), from, to]);
    }
  markTree(snapshots, prefix, gone);
  for (const destination of destinations)
    if (!destination.startsWith("raw:")) markTree(destination, prefix, gone);
}

/** One digest of a subvolume, but for its snapshots and the subvolumes below it. */
export const stateOf = (path: string) =>
  sh(
    `cd "$1"; { stat -c '%a %u:%g' .; find . -mindepth 1 \\( -inum 2 -prune -o -inum 256 -prune -o -path ./snapshot -prune -o -print0 \\) | LC_ALL=C sort -z | tar --format=posix --pax-option=delete=atime,delete=ctime --numeric-owner --xattrs --xattrs-include='*' --acls --no-recursion --null -T - -cf - 2>/dev/null; } | sha256sum`,
    path,
  );
