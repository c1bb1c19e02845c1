// What the benchmarks share.

/**
 * Ours beside a reference, measured in the same run.
 *
 * @typedef {{ name: string, ours: number, reference: number, unit: string, ratio: number }} Row
 */

/** The built package. */
export async function load() {
	/** @type {typeof import("../../ts/index.js")} */
	const kvferry = await import(new URL("../../dist/index.js", import.meta.url).href);
	return kvferry;
}

/** The middle value, of an odd number of them. */
export function median(/** @type {number[]} */ values) {
	return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN;
}
