// An element with its properties and children: what the scripts of the live view begin with.

function make(tag, options = {}, ...children) {
  const { className = "", ...others } = options;
  const element = Object.assign(document.createElement(tag), others);
  element.className = className;
  element.append(...children);
  return element;
}

