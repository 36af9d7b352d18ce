// Random choices that can be made again, and how many of them: no rig is needed for these.

/** A number for random choices: SEED, or a new one; printed, so that a failure can be repeated. */
export function seeded(): () => number {
  const seed = Number(process.env["SEED"] ?? Math.floor(Math.random() * 2 ** 31));
  console.log(`SEED=${seed}`);
  return generator(seed);
}

/** Mulberry32: small, and the same everywhere. */
export function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** How often a random loop runs. */
export const soak = (otherwise: number) => Number(process.env["SOAK"] ?? otherwise);
