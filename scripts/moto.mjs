// An S3 for the tests: moto's server.

import { fileURLToPath } from "node:url";
import { pythonEnvironment } from "./python.mjs";

// Apache-2.0. Its extra "server" would bring what S3 has no use for.
const PACKAGES = ["moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5"];

/**
 * The environment's Python, for `python -m moto.server`.
 *
 * @returns {string}
 * @throws {Error} Where Python's packages are refused, with the reason.
 */
export function installMoto() {
	return pythonEnvironment("moto-5.2.5", ["--only-binary=:all:", ...PACKAGES]);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	console.log(installMoto());
}
