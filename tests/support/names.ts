// Pure parts for tests of the planner: they need no rig.

import { entryName, type EntryName } from "../../btrfs-backup.ts";

/** A name that an entry can have. */
export function named(text: string): EntryName {
  const name = entryName(text);
  if (name === null) throw new Error(`${JSON.stringify(text)} is no name`);
  return name;
}
