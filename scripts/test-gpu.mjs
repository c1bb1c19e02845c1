// `npm run test:gpu`: the tests of CUDA pools on the machine's own driver, without what only the fake one can do.
// Where there is no GPU, one line says why, and nothing is run.

import { spawnSync } from "node:child_process";
import { requireRust, root, step, toolEnvironment } from "./setup.mjs";

requireRust();
const env = { ...toolEnvironment(), KVFERRY_TEST_GPU: "1" };
const cargo = ["test", "--locked", "--package", "kvferry-copy", "--test", "cuda"];
const asked = spawnSync(
	"cargo",
	[...cargo, "--quiet", "--", "--exact", "device_and_driver", "--nocapture"],
	{
		cwd: root,
		env,
		encoding: "utf8",
		stdio: ["ignore", "pipe", "inherit"],
	},
);
const found = /^(CUDA device|CUDA_UNAVAILABLE).*$/m.exec(asked.stdout)?.[0];
if (found === undefined) {
	console.error(asked.stdout);
	process.exitCode = 1;
} else if (found.startsWith("CUDA_UNAVAILABLE")) {
	console.log(`not run on a GPU: ${found}`);
} else {
	step(found);
	const options = ["--", "--test-threads=1", "--nocapture"];
	const server = [
		"test",
		"--locked",
		"--package",
		"kvferry-server",
		"--test",
		"lmcache_driven_cuda",
	];
	const engine = ["build", "--locked", "--package", "fake-cuda"]; // it has the engines' processes
	for (const args of [[...cargo, ...options], engine, [...server, ...options]]) {
		const { status } = spawnSync("cargo", args, { cwd: root, env, stdio: "inherit" });
		process.exitCode ||= status ?? 1;
	}
}
