// What the benchmarks share.

import { capture, root } from "../../scripts/setup.mjs";

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

/** Builds a program of bench/ and tells its path. */
export function buildProgram(
	/** @type {string} */ crate,
	/** @type {"--bin" | "--example"} */ kind,
	/** @type {string} */ name,
) {
	const build = ["build", "--release", "--quiet", "--locked", "-p", crate, kind, name];
	const messages = capture("cargo", [...build, "--message-format=json"]);
	for (const line of messages.split("\n")) {
		const { executable } = JSON.parse(line || "{}");
		if (executable) {
			return String(executable);
		}
	}
	throw new Error(`cargo ${build.join(" ")} in ${root} gave no program`);
}
