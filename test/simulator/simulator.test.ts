import { execFile } from "node:child_process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { describe, expect, it } from "vitest";

const SCRIPT = fileURLToPath(new URL("../../scripts/simulate.mjs", import.meta.url));

async function simulate(...args: string[]): Promise<{ code: number; output: string }> {
	try {
		const run = promisify(execFile);
		const { stdout, stderr } = await run(process.execPath, [SCRIPT, "--no-build", ...args]);
		return { code: 0, output: stdout + stderr };
	} catch (error) {
		const { code, stdout, stderr } = error as { code: number; stdout: string; stderr: string };
		return { code, output: stdout + stderr };
	}
}

/** What the fake driver says at the end of a process in which nothing is left but what its engines made. */
const ENGINES_OWN =
	"0 violations; alive: 1 streams, 0 events, 0 allocations, 0 pinned ranges, 0 modules, 1 contexts";

/** How much a run counts, and what of it never happened. */
function facts(output: string): { count: number; never: string[] } {
	const all = (output.split("\n")[0] as string).split(", ");
	return { count: all.length, never: all.filter((fact) => fact.startsWith("0 ")) };
}

describe("the simulator", () => {
	it("replays a seed exactly, and in a run of many seeds too", async () => {
		const [first, second] = await Promise.all([simulate("--seed", "11"), simulate("--seed", "11")]);
		const happened = (output: string) => output.split("\n")[0];
		expect(first.output).toContain("no violation");
		expect(happened(second.output)).toBe(happened(first.output));
		const failing = await simulate("--seed", "1", "--requests", "16000", "--defect", "SumForMax");
		expect(failing.code).toBe(1);
		const seed = /npm run simulate -- --seed (\d+)/.exec(failing.output)?.[1] as string;
		const replayed = await simulate("--seed", seed, "--defect", "SumForMax");
		const message = /seed \d+, tick .*/.exec(failing.output)?.[0];
		expect(replayed.output).toContain(message);
	}, 120_000);

	it("notices each deliberate defect within a minute", async () => {
		const { code, output } = await simulate("--defects");
		expect(output).not.toContain("not noticed");
		expect(output.match(/: noticed in/g)?.length).toBeGreaterThanOrEqual(10);
		expect(code).toBe(0);
	}, 900_000);

	it("makes everything happen that it is there for", async () => {
		const { output } = await simulate("--seed", "1", "--requests", "8000");
		const { count, never } = facts(output);
		expect([count > 15, never]).toEqual([true, ["0 gpu copies", "0 failed calls"]]);
	}, 120_000);

	it("finds nothing wrong when KV memory is a GPU's, by the fake driver", async () => {
		const { output } = await simulate("--seed", "1", "--requests", "800", "--cuda");
		expect(output).toContain("800 requests simulated over 2 seeds from 1 with CUDA");
		expect(output).toContain("no violation");
		const { never } = facts(output);
		expect(never).not.toContain("0 gpu copies");
		expect(never).not.toContain("0 failed calls");
		// An engine keeps its own stream and context to its end, so that FAKECUDA_STRICT would fail each of them.
		const accounts = output.match(/(?<=^\[fake-cuda\] at exit: ).*/gm) ?? [];
		expect(new Set(accounts)).toEqual(new Set([ENGINES_OWN]));
	}, 120_000);

	it("refuses what it does not know", async () => {
		expect((await simulate("--defect", "Nonsense")).output).toMatch(
			/there is no defect "Nonsense"/,
		);
		expect((await simulate("--seed", "x")).output).toMatch(/--seed is x/);
	}, 60_000);
});
