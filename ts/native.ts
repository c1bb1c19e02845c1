import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { KvferryError } from "./errors.js";
import type * as Binding from "./native-binding.js";

/** What the addon exports. */
export type NativeBinding = typeof Binding;

/** Where this process runs, in the terms that the platform packages are named by. */
export interface Platform {
	/** `process.platform`. */
	readonly os: string;
	/** `process.arch`. */
	readonly arch: string;
	/** The C library, on Linux. */
	readonly libc?: "gnu" | "musl";
}

const REMEDY =
	"Install kvferry on that platform with optional dependencies enabled " +
	"(npm install --include=optional), or the tarball of its binary beside it; or, in a clone, " +
	"npm run build, which needs Rust from https://rustup.rs.";

let binding: NativeBinding | undefined;

/**
 * The addon, loaded by the first call. Importing kvferry never loads it, so an import succeeds
 * where no binary exists.
 *
 * @throws {@link KvferryError} `UNSUPPORTED_PLATFORM` when this platform has no binary.
 */
export function native(): NativeBinding {
	binding ??= loadBinding(currentPlatform(), createRequire(import.meta.url));
	return binding;
}

/**
 * Loads the addon: the package's own build if there is one, else the platform package.
 *
 * @param platform Where it will run.
 * @param require Resolves from inside this package.
 */
export function loadBinding(platform: Platform, require: NodeJS.Require): NativeBinding {
	const name = platformName(platform);
	const failures: unknown[] = [];
	for (const candidate of [() => localBuild(name, require), () => `@kvferry/${name}`]) {
		try {
			return require(candidate()) as NativeBinding;
		} catch (error) {
			failures.push(error);
		}
	}
	// A binary that is there but does not load (an older C library, say) explains more than absence.
	const reason = failures.find(
		(error) => (error as NodeJS.ErrnoException).code !== "MODULE_NOT_FOUND",
	);
	const detail = reason instanceof Error ? `cannot be loaded (${reason.message})` : "is missing";
	throw new KvferryError(
		"UNSUPPORTED_PLATFORM",
		`The kvferry binary for platform ${platform.os}, architecture ${platform.arch}, ` +
			`C library ${platform.libc ?? "of the system"} (@kvferry/${name}) ${detail}. ${REMEDY}`,
		{ cause: reason ?? failures.at(-1) },
	);
}

/** The suffix of the platform package and of the local build. */
export function platformName({ os, arch, libc }: Platform): string {
	const abi = os === "win32" ? "msvc" : libc;
	return abi === undefined ? `${os}-${arch}` : `${os}-${arch}-${abi}`;
}

/** The platform of this process. */
export function currentPlatform(): Platform {
	const { platform: os, arch } = process;
	return os === "linux" ? { os, arch, libc: currentLibc() } : { os, arch };
}

function currentLibc(): "gnu" | "musl" {
	// excludeNetwork is younger than the declarations of Node 20.
	const report: typeof process.report & { excludeNetwork?: boolean } = process.report;
	const { excludeNetwork = false } = report;
	report.excludeNetwork = true; // else the report may look up the names of all peers
	try {
		const { header } = report.getReport() as { header: { glibcVersionRuntime?: string } };
		return header.glibcVersionRuntime === undefined ? "musl" : "gnu";
	} finally {
		report.excludeNetwork = excludeNetwork;
	}
}

function localBuild(name: string, require: NodeJS.Require): string {
	// By its own name the package finds its root from every bundle, however deep that lies.
	return join(dirname(require.resolve("kvferry/package.json")), `kvferry.${name}.node`);
}
