// `npm test`: sets up, builds, and runs the Rust and the TypeScript tests. The last line counts both.

import { spawn } from "node:child_process";
import { mkdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { buildAddon, buildJavaScript } from "./build.mjs";
import { buildFakeCuda } from "./fake-cuda.mjs";
import { cache, root, setup, step, toolEnvironment } from "./setup.mjs";
import { buildSimulator } from "./simulator-build.mjs";

setup();
buildAddon();
buildJavaScript();
await buildSimulator();
if (process.platform === "linux") {
	buildFakeCuda();
}
const rust = await testRust();
const typescript = await testTypeScript();
const passed = rust.passed + typescript.passed;
const failed = rust.failed + typescript.failed;
console.log(`\n${passed} passed, ${failed} failed`);
process.exitCode = rust.ok && typescript.ok ? 0 : 1;

async function testRust() {
	step("cargo test");
	let output = "";
	const ok = await stream(
		"cargo",
		["test", "--workspace", "--locked", "--no-fail-fast"],
		(text) => {
			output += text;
		},
	);
	const count = (/** @type {RegExp} */ pattern) =>
		[...output.matchAll(pattern)].reduce((sum, match) => sum + Number(match[1]), 0);
	return { ok, passed: count(/(\d+) passed;/g), failed: count(/(\d+) failed;/g) };
}

async function testTypeScript() {
	step("vitest");
	const report = join(cache, "vitest.json");
	mkdirSync(cache, { recursive: true });
	rmSync(report, { force: true });
	const reporters = ["--reporter=default", "--reporter=json", `--outputFile.json=${report}`];
	const ok = await stream("vitest", ["run", ...reporters]);
	const { numPassedTests, numFailedTests } = JSON.parse(readFileSync(report, "utf8"));
	return { ok, passed: numPassedTests, failed: numFailedTests };
}

/** Runs a program, passing on what it prints, and tells whether it succeeded. */
function stream(
	/** @type {string} */ command,
	/** @type {string[]} */ args,
	/** @type {(text: string) => void} */ onOutput = () => {},
) {
	const child = spawn(command, args, {
		cwd: root,
		env: toolEnvironment(),
		stdio: ["ignore", "pipe", "inherit"],
	});
	child.stdout.setEncoding("utf8").on("data", (text) => {
		process.stdout.write(text);
		onOutput(text);
	});
	return new Promise((resolve, reject) => {
		child.once("error", reject).once("close", (code) => resolve(code === 0));
	});
}
