// Pure parts for tests of the planner: they need no rig.

import { entryName, type EntryName } from "../../btrfs-backup.ts";

/** A name that an entry can have. */
export function named(text: string): EntryName {
  const name = entryName(text);
  if (name === null) throw new Error(`${JSON.stringify(text)} is no name`);
  return name;
}

/** A UUID of its own for each number. */
export const numberedUuid = (n: number) =>
  `${String(n).padStart(8, "0")}-aaaa-bbbb-cccc-0123456789ab`;

/** The name of a snapshot that was taken at midnight of a day in January 2026. */
export const day = (n: number) => `202601${String(n).padStart(2, "0")}-000000`;
