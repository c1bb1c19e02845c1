// An S3 for the tests: moto's server in a Python environment of its own, made once and kept.

import { existsSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { runQuietly } from "./engine.mjs";
import { cache, root, step } from "./setup.mjs";

// Apache-2.0. Its extra "server" would bring what S3 has no use for.
const PACKAGES = ["moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5"];

/**
 * The environment's Python, for `python -m moto.server`.
 *
 * @returns {string}
 * @throws {Error} Where Python's packages are refused, with the reason.
 */
export function installMoto() {
	const venv = join(cache, "moto-5.2.5");
	const python = (/** @type {string} */ directory) => join(directory, "bin", "python");
	if (existsSync(python(venv))) {
		return python(venv);
	}
	step("moto into .cache");
	const partial = `${venv}.${process.pid}`;
	try {
		runQuietly("python3", ["-m", "venv", "--without-pip", partial], root);
		const pip = ["-m", "pip", "--python", python(partial), "--disable-pip-version-check"];
		const install = ["install", "--quiet", "--only-binary=:all:", ...PACKAGES];
		runQuietly("python3", [...pip, ...install], root);
		if (!existsSync(venv)) {
			renameSync(partial, venv); // complete, or not there
		}
	} finally {
		rmSync(partial, { recursive: true, force: true });
	}
	return python(venv);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	console.log(installMoto());
}
