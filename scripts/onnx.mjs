// What the tests and the example of ONNX models need beside the package: the engines in examples/onnx-chat, and
// a tiny model that scripts/tiny-onnx.py builds. Each is made once and kept.

import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { installExample, runQuietly } from "./engine.mjs";
import { cache, root, step } from "./setup.mjs";

/** The example, with onnxruntime-node and transformers.js in its node_modules. */
export const onnxExample = join(root, "examples", "onnx-chat");

const script = join(root, "scripts", "tiny-onnx.py");
const requirements = join(root, "scripts", "onnx-requirements.txt");

/**
 * Installs the engines, unless that was done already.
 *
 * @throws {Error} Where that is refused, with the reason.
 */
export function installOnnx() {
	installExample(onnxExample);
}

/**
 * The tiny model's directory, with config.json and onnx/model.onnx, …
 *
 * @returns {string}
 * @throws {Error} Where Python's packages are refused, with the reason.
 */
export function buildTinyModel() {
	const hash = createHash("sha256").update(readFileSync(script)).update(readFileSync(requirements));
	const model = join(cache, "models", `tiny-onnx-${hash.digest("hex").slice(0, 16)}`);
	if (existsSync(model)) {
		return model;
	}
	step("tiny ONNX model");
	const partial = `${model}.${process.pid}`;
	const venv = `${partial}.venv`;
	mkdirSync(partial, { recursive: true });
	try {
		const python = join(venv, "bin", "python");
		runQuietly("python3", ["-m", "venv", "--without-pip", venv], root);
		const pip = ["-m", "pip", "--python", python, "--disable-pip-version-check", "install"];
		runQuietly("python3", [...pip, "--quiet", "--only-binary=:all:", "-r", requirements], root);
		runQuietly(python, [script, partial], root);
		if (!existsSync(model)) {
			renameSync(partial, model); // complete, or not there
		}
	} finally {
		rmSync(partial, { recursive: true, force: true });
		rmSync(venv, { recursive: true, force: true }); // 100 MB for 500 KB
	}
	return model;
}

/** Says in one line what is left out, and why it could not be installed. */
export function skipped(/** @type {string} */ what, /** @type {unknown} */ error) {
	const lines = /** @type {Error} */ (error).message.split("\n");
	const reason = lines.find((line) => /\berror\b/i.test(line)) ?? lines[0];
	process.stderr.write(`SKIPPED: ${what}: ${reason}\n`);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	installOnnx();
	console.log(buildTinyModel());
}
