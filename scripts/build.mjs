// Builds the addon (kvferry.<platform>.node beside package.json) and the JavaScript in dist/.
// `--target TRIPLE` builds the addon for another platform, `--without-remote DIR` one without Redis and S3 into DIR.

import { homedir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { hostTarget } from "./platforms.mjs";
import { root, run, setup, step, toolEnvironment } from "./setup.mjs";

/**
 * Builds the addon for `target` and its declarations; cargo decides what is stale.
 *
 * @param {string} target
 * @param {{ output: string, features: string[] } | undefined} special A build that is not the package's.
 */
export function buildAddon(target = hostTarget(), special = undefined) {
	step(`addon for ${target}`);
	const env = { ...toolEnvironment(), RUSTFLAGS: flags() };
	run(
		"napi",
		[
			...["build", "--platform", "--release", "--target", target],
			...["--package", "kvferry-node", "--manifest-path", "crates/kvferry-node/Cargo.toml"],
			...["--package-json-path", "package.json", "--no-js", "--no-const-enum"],
			...["--output-dir", special?.output ?? "."],
			...["--dts", special === undefined ? "ts/native-binding.d.ts" : "native-binding.d.ts"],
			...(special === undefined
				? []
				: ["--no-default-features", ...special.features.flatMap((name) => ["--features", name])]),
		],
		{
			env: target.includes("-linux-")
				? { ...env, CARGO: join(root, "scripts", "cargo-portable") }
				: env,
		},
	);
}

/** Bundles ts/ into dist/. */
export function buildJavaScript() {
	step("JavaScript");
	run("tsup", ["--silent"]);
}

/** No path of the building machine gets into the binary. */
function flags() {
	const cargoHome = process.env.CARGO_HOME ?? join(homedir(), ".cargo");
	const remaps = [`${cargoHome}=/cargo`, `${root.replace(/[\\/]$/, "")}=/kvferry`];
	const own = process.env.RUSTFLAGS === undefined ? [] : [process.env.RUSTFLAGS];
	return [...own, ...remaps.map((remap) => `--remap-path-prefix=${remap}`)].join(" ");
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	const { values } = parseArgs({
		options: { target: { type: "string" }, "without-remote": { type: "string" } },
	});
	const { target, "without-remote": output } = values;
	setup();
	buildAddon(target, output === undefined ? undefined : { output, features: [] });
	if (target === undefined && output === undefined) {
		buildJavaScript();
	}
}
