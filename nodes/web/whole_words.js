// The page breaks a running node's text anywhere in its words, which makes lines like ours hard to read.

const style = document.createElement("style");
style.textContent = ".flex-1.items-center.break-all { word-break: normal; overflow-wrap: anywhere; }";
document.head.append(style);
