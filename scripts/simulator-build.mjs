// The simulator's own build of the package: the same sources, with a clock that it sets and deliberate defects.

import { mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { buildAddon } from "./build.mjs";
import { hostTarget } from "./platforms.mjs";
import { root, run, step } from "./setup.mjs";

/** Where it lies: a package of its own. */
export const simulatorRoot = join(root, "target", "simulator");

/** Builds it; cargo decides what is stale. */
export async function buildSimulator() {
	mkdirSync(simulatorRoot, { recursive: true });
	const exports = { "./package.json": "./package.json" };
	const manifest = { name: "kvferry", version: "0.0.0", private: true, type: "module", exports };
	writeFileSync(join(simulatorRoot, "package.json"), JSON.stringify(manifest));
	buildAddon(hostTarget(), { output: simulatorRoot, features: ["simulator"] });
	step("JavaScript of the simulator");
	const out = join(simulatorRoot, "dist");
	run("tsup", [
		"ts/index.ts",
		"--no-config",
		"--format",
		"esm",
		"--target",
		"node20",
		"--silent",
		"--out-dir",
		out,
	]);
}

/** The addon of a package. @param {string} home */
export function addonOf(home) {
	const name = readdirSync(home).find((file) => file.endsWith(".node"));
	if (name === undefined) {
		throw new Error(`there is no addon in ${home}: build it first`);
	}
	return join(home, name);
}
