/**
 * The part of node-llama-cpp that kvferry uses. Its own classes fit, and kvferry needs no copy of
 * that package to be built or type-checked.
 */

/** `Llama`. */
export interface EngineLlama {
	readonly llamaCppRelease: { readonly repo: string; readonly release: string };
	readonly buildType: string;
	readonly gpu: string | false;
}

/** `LlamaModel`. */
export interface EngineModel {
	readonly llama: EngineLlama;
	readonly filename: string | undefined;
	readonly architecture: string;
	readonly tokenizer: EngineTokenizer;
	readonly tokens: { readonly bos: number | null };
	readonly fileInfo: { readonly metadata: object; readonly splicedParts: number };
	readonly fileInsights: {
		readonly isRecurrent: boolean;
		readonly isHybrid: boolean;
		readonly hasEncoder: boolean;
		readonly swaSize: number | undefined;
	};
}

/** `Tokenizer`. */
// biome-ignore lint/suspicious/noExplicitAny: kvferry passes it on, its overloads do not matter
export type EngineTokenizer = (...args: any[]) => number[];

/** `LlamaContext`. */
export interface EngineContext {
	readonly model: EngineModel;
	readonly flashAttention: "auto" | boolean;
	readonly sequencesLeft: number;
	getSequence(): EngineSequence;
}

/** `LlamaContextSequence`. */
export interface EngineSequence {
	readonly context: EngineContext;
	readonly disposed: boolean;
	readonly contextSize: number;
	readonly nextTokenIndex: number;
	readonly contextTokens: number[];
	readonly tokenMeter: { readonly usedInputTokens: number; readonly usedOutputTokens: number };
	adaptStateToTokens(tokens: number[], allowShift?: boolean): Promise<void>;
	clearHistory(): Promise<void>;
	evaluateWithoutGeneratingNewTokens(tokens: number[]): Promise<void>;
	saveStateToFile(path: string): Promise<unknown>;
	loadStateFromFile(path: string, acceptRisk: { acceptRisk: true }): Promise<void>;
	dispose(): Promise<void>;
}

/** One turn of a chat, in the shape of `ChatHistoryItem`. */
export type EngineChatItem =
	| { type: "user"; text: string }
	| { type: "model"; response: string[] }
	| { type: "system"; text: string };

/** `LlamaChatSession`. */
export interface EngineChatSession {
	readonly sequence: EngineSequence;
	readonly chatWrapper: {
		// biome-ignore lint/suspicious/noExplicitAny: histories pass through from the session itself
		generateContextState(options: any): {
			contextText: { tokenize(tokenizer: EngineTokenizer): number[] };
		};
	};
	// biome-ignore lint/suspicious/noExplicitAny: each item goes back into the wrapper unread
	getChatHistory(): any[];
	// biome-ignore lint/suspicious/noExplicitAny: the same
	getLastEvaluationContextWindow(): any[] | null;
	// biome-ignore lint/suspicious/noExplicitAny: options are the session's own
	prompt(text: string, options?: any): Promise<string>;
}
