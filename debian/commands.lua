-- SPDX-License-Identifier: GPL-2.0-or-later
-- A filter of pandoc for docs/commands.md as a man page.  A table becomes a list of definitions,
-- because its columns are too narrow on a terminal.  A link to another document becomes its text.

function Table(table)
  local simple = pandoc.utils.to_simple_table(table)
  local items = {}
  for _, row in ipairs(simple.rows) do
    local term = pandoc.Strong(pandoc.utils.blocks_to_inlines(row[1]))
    local meaning = row[#row]
    if #row == 3 and #row[2] > 0 then
      local default = pandoc.utils.blocks_to_inlines(row[2])
      default:insert(1, pandoc.Str("Default: "))
      meaning:insert(pandoc.Para(default))
    end
    items[#items + 1] = { { term }, { meaning } }
  end
  return pandoc.DefinitionList(items)
end

function Link(link)
  return link.content
end

-- The sections of a man page begin with its name.
function Pandoc(document)
  local name = "xen-postcopy-commands - commands, options and results of xen-postcopy"
  document.blocks:insert(1, pandoc.Header(1, "NAME"))
  document.blocks:insert(2, pandoc.Para(pandoc.Str(name)))
  document.blocks:insert(3, pandoc.Header(1, "DESCRIPTION"))
  document.meta.title = "XEN-POSTCOPY-COMMANDS"
  document.meta.section = "7"
  document.meta.header = "System administration"
  document.meta.footer = "xen-postcopy"
  return document
end
