// Processes that the program started, as /proc tells of them.

import { existsSync, readdirSync, readFileSync } from "node:fs";

type Process = { pid: number; parent: number; group: number; text: string };

/** All processes of this test run, which has a PID namespace of its own; `text`: the command line. */
function all(): Process[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .flatMap((name) => {
      try {
        const [, parent = "", group = ""] =
          /^\d+ \(.*\) \S (\d+) (\d+)/s.exec(readFileSync(`/proc/${name}/stat`, "utf8")) ?? [];
        const text = readFileSync(`/proc/${name}/cmdline`, "utf8").replaceAll("\0", " ").trim();
        return [{ pid: Number(name), parent: Number(parent), group: Number(group), text }];
      } catch {
        return []; // it has ended
      }
    });
}

/** All that a process has started, by their IDs, with their command lines. */
export function descendants(pid: number): Process[] {
  const processes = all();
  const found = new Set([pid]);
  for (let before = 0; before !== found.size;) {
    before = found.size;
    for (const one of processes) if (found.has(one.parent)) found.add(one.pid);
  }
  return processes.filter((one) => one.pid !== pid && found.has(one.pid));
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

/** Kills the processes of this test run that have such a command line. */
export function killAll(commandLine: RegExp): void {
  for (const { pid, text } of all()) if (pid !== process.pid && commandLine.test(text)) signal(pid);
}
