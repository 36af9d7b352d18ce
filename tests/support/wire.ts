// Commands as a run sends them over ssh, and what they say of a folder.

import { commandFor, type Host, type Verb, VERBS } from "../../btrfs-backup.ts";
import { sh } from "./rig.ts";

export const HOST: Host = { label: "", ssh: null, sudo: false, beat: 15 };
export const verbNamed = (name: string) => VERBS.find((verb) => verb.name === name) as Verb;

/** What a run sends over ssh for a verb. */
export const sent = (name: string, ...args: string[]) => commandFor(HOST, verbNamed(name), args);
export const fsidOf = (path: string) => sh(`stat -f -c %i "$1"`, path);
