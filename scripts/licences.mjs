// Every crate that the workspace builds carries a licence that fits with Apache-2.0.

import { capture, fail } from "./setup.mjs";

const ALLOWED = new Set([
	"0BSD",
	"Apache-2.0",
	"Apache-2.0 WITH LLVM-exception",
	"BSD-2-Clause",
	"BSD-3-Clause",
	"BSL-1.0",
	"CC0-1.0",
	"CDLA-Permissive-2.0", // of data: Mozilla's certificates, where a platform has none of its own
	"ISC",
	"MIT",
	"MIT-0",
	"Unicode-3.0",
	"Unlicense",
	"Zlib",
]);

/** Ends the process with the crates that none of the allowed licences covers. */
export function checkLicences() {
	const json = capture("cargo", ["metadata", "--format-version", "1", "--locked"]);
	if (json === "") {
		fail("cargo metadata failed: is Cargo.lock up to date?");
	}
	/** @type {{ packages: { name: string, version: string, license: string | null }[] }} */
	const { packages } = JSON.parse(json);
	const refused = packages.filter(({ license }) => !isAllowed(license ?? ""));
	if (refused.length > 0) {
		const names = refused.map(({ name, version, license }) => `${name} ${version} (${license})`);
		fail(`licences not on the list of scripts/licences.mjs: ${names.join(", ")}`);
	}
}

/** SPDX: one side of each OR, all sides of each AND; `/` is an old form of OR. */
function isAllowed(/** @type {string} */ expression) {
	return expression
		.replace(/[()]/g, "")
		.split(" AND ")
		.every((term) => term.split(/ OR |\//).some((licence) => ALLOWED.has(licence.trim())));
}
