import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { example, fetchModel, installEngine } from "../../scripts/engine.mjs";
import type {
	EngineChatSession,
	EngineContext,
	EngineSequence,
} from "../../ts/engines/llama-cpp.js";

/** What the tests do with the real engine, besides what kvferry does. */
export interface TestSequence extends EngineSequence {
	evaluate(tokens: number[], options: { temperature: number }): AsyncGenerator<number>;
	eraseContextTokenRanges(ranges: { start: number; end: number }[]): Promise<void>;
	dispose(): Promise<void>;
}

export interface TestContext extends EngineContext {
	getSequence(): TestSequence;
	dispose(): Promise<void>;
}

export interface TestSession extends EngineChatSession {
	dispose(): void;
}

/** The real engine with its small model. */
export interface Engine {
	/** 1,100 tokens and more. */
	readonly tokens: number[];
	readonly modelPath: string;
	createContext(options?: object): Promise<TestContext>;
	/** A context of a model that is loaded for it, and goes with it: one that the garbage collector took kept the engine from ending. */
	createContextOf(modelPath: string): Promise<{ context: TestContext; dispose(): Promise<void> }>;
	createSession(contextSequence: TestSequence, systemPrompt: string, options?: object): TestSession;
	dispose(): Promise<void>;
}

/** Installs and downloads what is not there yet. */
export async function openEngine(): Promise<Engine> {
	installEngine();
	const modelPath = await fetchModel();
	const require = createRequire(join(example, "package.json"));
	const { getLlama, LlamaChatSession, LlamaLogLevel } = await import(
		pathToFileURL(require.resolve("node-llama-cpp")).href
	);
	const llama = await getLlama({
		build: "never",
		gpu: false,
		skipDownload: true,
		logLevel: LlamaLogLevel.error,
	});
	const model = await llama.loadModel({ modelPath });
	const document = readFileSync(join(example, "document.txt"), "utf8");
	return {
		tokens: model.tokenize(document),
		modelPath,
		createContextOf: async (path) => {
			const model = await llama.loadModel({ modelPath: path });
			const context = await model.createContext({ contextSize: 256, threads: 1 });
			return { context, dispose: () => model.dispose() };
		},
		createContext: (options = {}) =>
			model.createContext({ contextSize: 512, batchSize: 128, threads: 1, ...options }),
		createSession: (contextSequence, systemPrompt, options = {}) =>
			new LlamaChatSession({ contextSequence, systemPrompt, ...options }),
		dispose: () => llama.dispose(),
	};
}

/** Evaluates what the sequence does not hold of `prompt`, and goes on greedily. */
export async function complete(
	sequence: TestSequence,
	prompt: number[],
	count = 8,
): Promise<number[]> {
	const answer: number[] = [];
	const rest = prompt.slice(sequence.nextTokenIndex);
	for await (const token of sequence.evaluate(rest, { temperature: 0 })) {
		answer.push(token);
		if (answer.length === count) {
			break;
		}
	}
	return answer;
}
