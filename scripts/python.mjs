// Python environments of their own for programs that tests run, each made once and kept.

import { existsSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { runQuietly } from "./engine.mjs";
import { cache, root, step } from "./setup.mjs";

const BINARY = join("bin", "python");

/**
 * The Python of the environment `name` in .cache.
 *
 * @param {string} name Another one whenever what is installed changes.
 * @param {...string[]} installs What pip is told to install, one call after the other.
 * @returns {string}
 * @throws {Error} Where Python's packages are refused, with the reason.
 */
export function pythonEnvironment(name, ...installs) {
	const venv = join(cache, name);
	if (existsSync(pythonOf(name))) {
		return pythonOf(name);
	}
	step(`${name} into .cache`);
	const partial = `${venv}.${process.pid}`;
	try {
		runQuietly("python3", ["-m", "venv", "--without-pip", partial], root);
		const pip = ["-m", "pip", "--python", join(partial, BINARY), "--disable-pip-version-check"];
		for (const packages of installs) {
			runQuietly("python3", [...pip, "install", "--quiet", ...packages], root);
		}
		if (!existsSync(venv)) {
			renameSync(partial, venv); // complete, or not there
		}
	} finally {
		rmSync(partial, { recursive: true, force: true });
	}
	return pythonOf(name);
}

/** The Python that the environment `name` has once it is made. */
export function pythonOf(/** @type {string} */ name) {
	return join(cache, name, BINARY);
}
