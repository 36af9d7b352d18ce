// Processes that the program started, as /proc tells of them.

import { existsSync, readdirSync, readFileSync } from "node:fs";

/** All that a process has started, by their IDs, with their command lines. */
export function descendants(
  pid: number,
): { pid: number; parent: number; group: number; text: string }[] {
  const all = readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .flatMap((name) => {
      try {
        const [, parent = "", group = ""] =
          /^\d+ \(.*\) \S (\d+) (\d+)/s.exec(readFileSync(`/proc/${name}/stat`, "utf8")) ?? [];
        const text = readFileSync(`/proc/${name}/cmdline`, "utf8").replaceAll("\0", " ");
        return [{ pid: Number(name), parent: Number(parent), group: Number(group), text }];
      } catch {
        return []; // it has ended
      }
    });
  const found = new Set([pid]);
  for (let before = 0; before !== found.size;) {
    before = found.size;
    for (const one of all) if (found.has(one.parent)) found.add(one.pid);
  }
  return all.filter((one) => one.pid !== pid && found.has(one.pid));
}

/** Whether a process is there, and not only waited for. */
export const isAlive = (pid: number) =>
  existsSync(`/proc/${pid}/stat`) && !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, "utf8"));

/** Kills a process, if it is there. */
export const signal = (pid: number) => {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // it has ended
  }
};
